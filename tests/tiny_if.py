"""DeepFloyd IF U-Nets of a few hundred thousand parameters, for tests.

The configs differ in the options that they cover. `parameters` fills every
tensor from numpy, so diffusers and this project have the same network and no
norm or bias has its initial value of 1 or 0.
"""

import copy
import json

import numpy as np
from flax.traverse_util import unflatten_dict

from imagen_jax.deepfloyd import config, unet, weights
from imagen_jax.text.tokenizer import VOCABULARY
from tests import tiny_text

COMMON = {
  '_class_name': 'UNet2DConditionModel',
  'act_fn': 'gelu',
  'addition_embed_type': 'text',
  'addition_embed_type_num_heads': 2,
  'attention_head_dim': 8,
  'cross_attention_dim': 32,
  'cross_attention_norm': 'group_norm',
  'encoder_hid_dim': 32,
  'encoder_hid_dim_type': 'text_proj',
  'mid_block_type': 'UNetMidBlock2DSimpleCrossAttn',
  'out_channels': 6,
  'resnet_time_scale_shift': 'scale_shift',
}
PLAIN, ATTENDS = 'ResnetDownsampleBlock2D', 'SimpleCrossAttnDownBlock2D'
UP = {PLAIN: 'ResnetUpsampleBlock2D', ATTENDS: 'SimpleCrossAttnUpBlock2D'}


def _make(down, **fields):
  return COMMON | {
    'down_block_types': list(down),
    'up_block_types': [UP[name] for name in reversed(down)],
    **fields,
  }


CONFIGS = {
  # The two configs of diffusers' own fast tests.
  'fast_1': _make(
    (PLAIN, ATTENDS),
    sample_size=32,
    in_channels=3,
    layers_per_block=1,
    block_out_channels=[32, 64],
  ),
  'fast_2': _make(
    (PLAIN, ATTENDS),
    sample_size=32,
    in_channels=6,
    layers_per_block=[1, 2],
    block_out_channels=[32, 64],
    class_embed_type='timestep',
    mid_block_scale_factor=1.414,
    time_embedding_act_fn='gelu',
    time_embedding_dim=32,
  ),
  # Shaped like IF-I and IF-II, narrower.
  'like_1': _make(
    (PLAIN, ATTENDS, ATTENDS),
    sample_size=16,
    in_channels=3,
    layers_per_block=2,
    block_out_channels=[32, 64, 96],
    cross_attention_dim=64,
    encoder_hid_dim=48,
    addition_embed_type_num_heads=4,
  ),
  'like_2': _make(
    (PLAIN, PLAIN, ATTENDS, ATTENDS),
    sample_size=16,
    in_channels=6,
    layers_per_block=[1, 2, 3, 2],
    block_out_channels=[32, 32, 64, 96],
    cross_attention_dim=64,
    encoder_hid_dim=48,
    addition_embed_type_num_heads=4,
    class_embed_type='timestep',
    time_embedding_dim=96,
    time_embedding_act_fn='gelu',
    resnet_skip_time_act=True,
    resnet_out_scale_factor=1.4142271248762552,
    mid_block_scale_factor=1.4142271248762552,
  ),
  # Options that the format allows and the published configs do not use.
  'rare': _make(
    (ATTENDS, ATTENDS),
    sample_size=16,
    in_channels=3,
    out_channels=3,
    layers_per_block=[2, 1],
    block_out_channels=[32, 64],
    attention_head_dim=[8, 16],
    only_cross_attention=[True, False],
    cross_attention_norm=None,
    encoder_hid_dim=None,
    encoder_hid_dim_type=None,
    norm_num_groups=16,
    norm_eps=1e-4,
    flip_sin_to_cos=False,
    freq_shift=1,
    act_fn='silu',
  ),
}


def raw_config(name):
  """The config.json of one of `CONFIGS`, as a copy."""
  return copy.deepcopy(CONFIGS[name])


def parameters(shapes, seed=0):
  """{name: float32 array} for {diffusers' name: shape}, in a fixed order.

  Norm scales are around 1, biases around 0; weights have standard deviation
  1 / sqrt(fan-in), which preserves the signal in a deep network.
  """
  rng = np.random.default_rng(seed)
  result = {}
  for name in sorted(shapes):
    shape = tuple(shapes[name])
    value = rng.normal(size=shape)
    if len(shape) == 1:
      value = 0.2 * value + (name.endswith('weight'))
    elif name.endswith('positional_embedding'):
      value = 0.3 * value
    else:
      value = value / np.sqrt(np.prod(shape[1:]))
    result[name] = value.astype(np.float32)
  return result


def inputs(raw, batch=2, side=8, tokens=7, seed=1):
  """(sample NHWC, t, text, noise_level or None) for a config."""
  rng = np.random.default_rng(seed)
  width = raw.get('encoder_hid_dim') or raw['cross_attention_dim']
  sample = rng.normal(size=(batch, side, side, raw['in_channels']))
  text = rng.normal(size=(batch, tokens, width))
  t = np.array([731.0, 12.0, 998.0, 420.0][:batch], np.float32)
  level = np.array([250.0, 3.0, 0.0, 90.0][:batch], np.float32)
  if raw.get('class_embed_type') is None:
    level = None
  return sample.astype(np.float32), t, text.astype(np.float32), level


def network(name, seed=0):
  """(module, params) of one of `CONFIGS`, every parameter perturbed."""
  module = unet.IFUNet(config.parse(raw_config(name)))
  leaves = weights.leaves(weights.abstract_params(module.config))
  names = {path: weights.torch_name(path) for path in leaves}
  shapes = {
    names[path]: weights.stored_shape(names[path], leaf.shape)
    for path, leaf in leaves.items()
  }
  arrays = parameters(shapes, seed)
  params = {p: weights.from_torch(n, arrays[n]) for p, n in names.items()}
  return module, unflatten_dict(params)


def write(folder):
  """Writes an IF folder of two stages, 8 and 32 pixels, with a T5."""
  schedule = {
    '_class_name': 'DDPMScheduler',
    'beta_schedule': 'squaredcos_cap_v2',
    'variance_type': 'learned_range',
    'thresholding': True,
    'dynamic_thresholding_ratio': 0.95,
    'clip_sample': True,
  }
  for stage, name, side, cap in (
    ('IF-I-S-v1.0', 'fast_1', 8, 1.5),
    ('IF-II-S-v1.0', 'fast_2', 32, 1.0),
  ):
    _, params = network(name)
    raw = raw_config(name) | {'sample_size': side}
    weights.save(folder / stage / 'unet', params, source=raw)
    noising = {'beta_schedule': 'squaredcos_cap_v2'}
    for part, content in (
      ('scheduler', schedule | {'sample_max_value': cap}),
      ('image_noising_scheduler', noising),
    ):
      (folder / stage / part).mkdir()
      path = folder / stage / part / 'scheduler_config.json'
      path.write_text(json.dumps(content))
    (folder / stage / 'model_index.json').write_text('{}')
  first = folder / 'IF-I-S-v1.0'
  tiny_text.random_folder(first / 'text_encoder', width=32)
  (first / 'tokenizer').mkdir()
  (first / 'text_encoder' / VOCABULARY).rename(first / 'tokenizer' / VOCABULARY)
  return folder
