"""DeepFloyd IF's U-Net against recorded outputs of diffusers, and its files.

`golden/deepfloyd_unet.npz` holds the outputs of diffusers 0.42.1 in float64
with the parameters and inputs of `tiny_if`. The tolerance is absolute. Every
mutation below, each a plausible porting mistake, exceeds it.
"""

import json
import math
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.deepfloyd import blocks, config, unet, weights
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import hub_folder, safetensors
from imagen_jax.nets import layers
from tests import tiny_if

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'deepfloyd_unet.npz'
TOLERANCE = 2e-5


def error(name, changed=None):
  """Largest difference from diffusers; `changed` replaces config fields."""
  module, params = tiny_if.network(name)
  fields = {**vars(module.config), **(changed or {})}
  module = unet.IFUNet(config.UNetConfig(**fields))
  given = tiny_if.inputs(tiny_if.raw_config(name))
  apply = jax.jit(lambda params, *xs: module.apply({'params': params}, *xs))
  with np.load(GOLDEN) as golden:
    return np.abs(np.asarray(apply(params, *given)) - golden[name]).max()


slow = pytest.mark.slow


@pytest.mark.parametrize(
  'name',
  [
    'fast_2',
    'like_2',
    *(pytest.param(n, marks=slow) for n in ('fast_1', 'like_1', 'rare')),
  ],
)
def test_the_network_gives_diffusers_output(name):
  assert error(name) < TOLERANCE


def _patch(target, name, value):
  return lambda patch: patch.setattr(target, name, value)


def _tanh_gelu(name):
  return {'gelu': jax.nn.gelu, None: lambda x: x}[name]


def _downsampling_strided(patch):
  patch.setitem(blocks.RESAMPLE, 'down', lambda x: x[:, ::2, ::2])


def _per_token(patch):
  norm = blocks.GroupNorm.__call__

  def call(self, x):
    if self.name != 'norm_cross':
      return norm(self, x)
    batch, tokens, _, width = x.shape
    x = x.reshape(batch * tokens, 1, 1, width)
    return norm(self, x).reshape(batch, tokens, 1, width)

  # Flax wraps methods when a class is created, so a subclass is needed.
  patch.setattr(blocks, 'GroupNorm', _subclass(blocks.GroupNorm, call))


def _subclass(cls, call):
  return type(cls.__name__, (cls,), {'__call__': call, '__annotations__': {}})


def _swapped(patch):
  split = jnp.split
  patch.setattr(
    unet.jnp, 'split', lambda *a, **k: tuple(reversed(split(*a, **k)))
  )


def _pool_sees_no_mean(patch):
  plain = blocks.attention

  def attention(q, k, v):
    first = q.shape[1] == 1
    return plain(q, k[:, 1:] if first else k, v[:, 1:] if first else v)

  patch.setattr(blocks, 'attention', attention)


def _scaled(patch):
  plain = blocks.attention
  patch.setattr(blocks, 'attention', lambda q, k, v: plain(q * 1.1, k, v))


def _interleaved(patch):
  plain = blocks.attention

  def mix(x):
    batch, length, heads, size = x.shape
    x = x.reshape(batch, length, size, heads)
    return jnp.swapaxes(x, 2, 3)

  patch.setattr(
    blocks, 'attention', lambda q, k, v: plain(mix(q), mix(k), mix(v))
  )


def _encoder_skips(patch):
  plain = unet.UpLevel

  def up_level(*args, **kwargs):
    level = plain(*args, **kwargs)

    def call(h, skips, *rest):
      if skips[0].shape == skips[1].shape:  # others cannot be swapped
        skips[:2] = skips[1::-1]
      return level(h, skips, *rest)

    return call

  patch.setattr(unet, 'UpLevel', up_level)


def _skip_before_h(patch):
  plain = jnp.concatenate

  def concatenate(parts, axis=0):
    return plain(parts[::-1] if parts[0].ndim == 4 else parts, axis)

  patch.setattr(unet.jnp, 'concatenate', concatenate)


# name: (config fields, patch or None), each applied to like_2.
MUTATIONS = {
  '√2 for 1/0.7071': ({'resnet_out_scale_factor': math.sqrt(2)}, None),
  'epsilon 1e-6': ({'norm_eps': 1e-6}, None),
  'epsilon 1e-6 in attention': ({}, _patch(blocks, 'NORM_EPS', 1e-6)),
  'tanh GELU': ({}, _patch(blocks, 'activation', _tanh_gelu)),
  'pooling without the mean among the keys': ({}, _pool_sees_no_mean),
  'softmax scale': ({}, _scaled),
  'text norm per token': ({}, _per_token),
  'no text norm': ({'cross_attention_norm': None}, None),
  'activation of the time twice': ({'resnet_skip_time_act': False}, None),
  'freq_shift 1': ({'freq_shift': 1}, None),
  'sine first': ({'flip_sin_to_cos': False}, None),
  'heads interleaved': ({}, _interleaved),
  'strided instead of averaged': ({}, _downsampling_strided),
  'scale and shift swapped': ({}, _swapped),
  'earliest skip first': ({}, _encoder_skips),
  'skip before h': ({}, _skip_before_h),
}


@pytest.mark.slow
@pytest.mark.parametrize('mutation', MUTATIONS)
def test_the_tolerance_notices_a_porting_mistake(
  mutation, monkeypatch, record_property
):
  changed, patch = MUTATIONS[mutation]
  if patch is not None:
    patch(monkeypatch)
  found = error('like_2', changed)
  record_property('error', float(found))
  print(f'{mutation}: {found:.1e}')
  assert found > TOLERANCE


@pytest.mark.slow
def test_bfloat16_is_near_and_its_result_float32():
  module, params = tiny_if.network('fast_2')
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  module = unet.IFUNet(module.config, jnp.bfloat16)
  given = tiny_if.inputs(tiny_if.raw_config('fast_2'))
  out = jax.jit(lambda p, *xs: module.apply({'params': p}, *xs))(half, *given)
  assert out.dtype == jnp.float32
  with np.load(GOLDEN) as golden:
    expected = golden['fast_2']
  rms = lambda x: np.sqrt(np.mean(x**2))
  assert 1e-4 < rms(np.asarray(out) - expected) / rms(expected) < 0.05


def test_pooled_text_is_a_text_of_its_own():
  module, params = tiny_if.network('fast_1')
  sample, t, text, _ = tiny_if.inputs(tiny_if.raw_config('fast_1'))
  rng = np.random.default_rng(5)
  other = rng.normal(size=text.shape).astype(np.float32)

  @jax.jit
  def apply(text, pooled):
    return module.apply({'params': params}, sample, t, text, None, pooled)

  own = np.asarray(apply(text, text))
  assert np.abs(np.asarray(apply(text, other)) - own).max() > 0.01
  assert np.abs(np.asarray(apply(other, text)) - own).max() > 0.01


def pooling(text, params, heads):
  """Attention pooling written with loops, in float64."""

  def dense(name, x):
    return x @ params[name]['kernel'] + params[name]['bias']

  mean = text.mean(axis=0) + params['positional_embedding'][0]
  keys = np.concatenate([mean[None], text])
  q, k, v = dense('q_proj', mean), dense('k_proj', keys), dense('v_proj', keys)
  out = []
  for part in np.split(np.arange(text.shape[1]), heads):
    logits = k[:, part] @ q[part] / math.sqrt(len(part))
    fraction = np.exp(logits - logits.max())
    out.append(fraction / fraction.sum() @ v[:, part])
  return np.concatenate(out)


def test_pooling_is_one_query_over_mean_and_tokens():
  rng = np.random.default_rng(0)
  text = rng.normal(size=(2, 5, 12)).astype(np.float32)
  module = blocks.AttentionPool(3, jnp.float32)
  params = jax.jit(module.init)(jax.random.key(1), text)['params']
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  expected = [pooling(row.astype(np.float64), exact, 3) for row in text]
  got = module.apply({'params': params}, text)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_features_of_time_are_float32_and_cosine_first():
  got = blocks.timestep_features(jnp.asarray([0.0, 999.0]), 8)
  frequencies = 1e4 ** (-np.arange(4) / 4)
  angles = np.array([[0.0], [999.0]]) * frequencies
  expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
  np.testing.assert_allclose(got, expected, atol=1e-4)
  half = jnp.asarray([0.0, 992.0], jnp.bfloat16)
  assert blocks.timestep_features(half, 8).dtype == jnp.float32


@pytest.mark.parametrize(
  'key, value',
  [
    ('down_block_types', ['KDownBlock2D'] * 2),
    ('down_block_types', ['ResnetDownsampleBlock2D']),
    ('mid_block_type', 'UNetMidBlock2DCrossAttn'),
    ('addition_embed_type', None),
    ('cross_attention_norm', 'layer_norm'),
    ('encoder_hid_dim_type', 'image_proj'),
    ('class_embed_type', 'projection'),
    ('conv_in_kernel', 5),
    ('act_fn', 'mish'),
    ('layers_per_block', [1, 0]),
    ('attention_head_dim', 7),
    ('cross_attention_dim', [32, 32]),
    ('sample_size', '64'),
    ('norm_eps', '1e-5'),
    ('resnet_out_scale_factor', 0),
    ('freq_shift', float('nan')),
    ('something_new', 1),
    ('_class_name', 'UNet3DConditionModel'),
  ],
)
def test_a_value_that_is_not_supported_is_refused_by_its_key(key, value):
  raw = tiny_if.raw_config('fast_1') | {key: value}
  with pytest.raises(ModelError) as caught:
    config.parse(raw)
  assert key in str(caught.value)


def test_the_middle_block_needs_whole_heads_too():
  plain = {'down_block_types': [tiny_if.PLAIN] * 2, 'attention_head_dim': 7}
  plain['up_block_types'] = [tiny_if.UP[tiny_if.PLAIN]] * 2
  with pytest.raises(ModelError) as caught:
    config.parse(tiny_if.raw_config('fast_1') | plain)
  assert 'attention_head_dim' in str(caught.value)


def test_keys_that_older_files_lack_have_diffusers_defaults():
  raw = tiny_if.raw_config('fast_1')
  full = config.parse(raw)
  del raw['encoder_hid_dim_type']
  raw['_diffusers_version'] = '0.16.0'
  assert config.parse(raw) == full
  assert full.norm_eps == 1e-5 and full.resnet_out_scale_factor == 1


@pytest.fixture
def folder(tmp_path):
  """A checkpoint in float16, with one tensor of another dtype."""
  _, params = tiny_if.network('fast_1')
  params = jax.tree.map(lambda x: x.astype(np.float16), params)
  params['conv_in']['bias'] = params['conv_in']['bias'].astype(
    ml_dtypes.bfloat16
  )
  raw = tiny_if.raw_config('fast_1') | {'_name_or_path': 'somewhere'}
  weights.save(tmp_path / 'unet', params, source=raw)
  return tmp_path / 'unet'


def stored(folder):
  """{name: (dtype, shape, bytes)} of a folder's tensors."""
  tensors = hub_folder.open_tensors(
    folder, weights.STEM, what='', convert=''
  ).items()
  return {
    name: (str(x.dtype), x.shape, x.read().tobytes()) for name, x in tensors
  }


def test_import_and_export_give_the_same_bytes(folder, tmp_path):
  _, params = weights.load(folder)
  raw = json.loads((folder / 'config.json').read_text())
  weights.save(tmp_path / 'again', params, source=raw)
  assert stored(tmp_path / 'again') == stored(folder)
  text = [
    json.loads((f / 'config.json').read_text())
    for f in (folder, tmp_path / 'again')
  ]
  assert text[0] == text[1]
  file = f'{weights.STEM}.safetensors'
  assert (folder / file).read_bytes() == (
    tmp_path / 'again' / file
  ).read_bytes()
  with pytest.raises(UsageError):
    weights.save(tmp_path / 'again', params, source=raw)


def test_shards_and_variants_are_read(folder):
  whole = stored(folder)
  file = folder / f'{weights.STEM}.safetensors'
  tensors = safetensors.open_file(file)
  index = {}
  for i, names in enumerate(np.array_split(sorted(tensors), 2)):
    part = f'{weights.STEM}.fp16-{i}.safetensors'
    safetensors.write_file(folder / part, {n: tensors[n] for n in names})
    index |= dict.fromkeys(names.tolist(), part)
  file.unlink()
  text = json.dumps({'weight_map': index})
  listed = folder / f'{weights.STEM}.safetensors.index.json'
  listed.write_text(text)
  assert stored(folder) == whole
  (folder / f'{weights.STEM}.fp16-0.safetensors').unlink()
  with pytest.raises(ModelError) as caught:
    stored(folder)
  assert 'fp16-0.safetensors' in str(caught.value)


def test_weights_arrive_sharded_and_cast(folder):
  mesh = sharding.make_mesh(fsdp=8)
  placed = []

  def place(leaf):
    placed.append((leaf.shape, leaf.dtype))
    return sharding.leaf_sharding(leaf, mesh)

  _, params = weights.load(folder, weights_dtype=jnp.float32, place=place)
  leaves = jax.tree.leaves(params)
  assert len(leaves) == len(placed) == 199
  assert {x.dtype for x in leaves} == {jnp.dtype('float32')}
  kernel = params['mid_block']['resnets_0']['conv1']['kernel']
  assert kernel.sharding == sharding.leaf_sharding(kernel, mesh)
  assert kernel.addressable_shards[0].data.size == kernel.size // 8
  _, plain = tiny_if.network('fast_1')
  expected = plain['mid_block']['resnets_0']['conv1']['kernel']
  np.testing.assert_array_equal(
    np.asarray(kernel), expected.astype(np.float16).astype(np.float32)
  )


LOADS = """
import os, re, sys
os.environ['JAX_PLATFORMS'] = 'cpu'
import jax
from imagen_jax.deepfloyd import config, weights
weights.abstract_params(config.read(sys.argv[1]))
jax.block_until_ready(jax.numpy.zeros(1))
status = lambda key: 1024 * int(
  re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]
)
before = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts anew
weights.load(sys.argv[1])
print((status('VmHWM') - before) / weights.num_bytes(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  not os.access('/proc/self/clear_refs', os.W_OK), reason='needs Linux'
)
def test_the_host_holds_little_more_than_the_checkpoint(tmp_path):
  raw = tiny_if.raw_config('fast_1') | {
    'block_out_channels': [512, 1024],
    'layers_per_block': 2,
  }
  folder = tmp_path / 'unet'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(raw))
  leaves = weights.leaves(weights.abstract_params(config.parse(raw))).items()
  tensors = {}
  for path, leaf in leaves:
    name = weights.torch_name(path)
    shape = weights.stored_shape(name, leaf.shape)
    full = lambda shape=shape: np.ones(shape, np.float16)
    tensors[name] = safetensors.Tensor(np.dtype('float16'), shape, full)
  safetensors.write_file(folder / f'{weights.STEM}.safetensors', tensors)
  assert weights.num_bytes(folder) > 2e8
  out = subprocess.run(
    [sys.executable, '-c', LOADS, folder],
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  print(f'peak over checkpoint: {float(out):.2f}')
  assert float(out) < 1.2


def _change(folder, change):
  file = folder / f'{weights.STEM}.safetensors'
  tensors = {k: v.read() for k, v in safetensors.open_file(file).items()}
  change(tensors)
  safetensors.write_file(
    file,
    {
      name: safetensors.Tensor(x.dtype, x.shape, lambda x=x: x)
      for name, x in tensors.items()
    },
  )


def _misshape(tensors):
  name = 'mid_block.attentions.0.to_q.weight'
  tensors[name] = tensors[name][:-1]


@pytest.mark.parametrize(
  'change, name',
  [
    (lambda t: t.pop('conv_in.bias'), 'conv_in.bias'),
    (lambda t: t.update(extra=np.zeros(2, np.float32)), 'extra'),
    (_misshape, 'mid_block.attentions.0.to_q.weight'),
  ],
)
def test_weights_that_do_not_fit_are_named(folder, change, name):
  _change(folder, change)
  with pytest.raises(ModelError) as caught:
    weights.load(folder)
  assert name in str(caught.value)


def test_pickles_are_refused(folder):
  (folder / f'{weights.STEM}.safetensors').unlink()
  (folder / f'{weights.STEM}.bin').write_bytes(pickle.dumps({}))
  with pytest.raises(ModelError) as caught:
    weights.load(folder)
  assert f'{weights.STEM}.bin' in str(caught.value)


def test_resampling_is_that_of_the_other_networks():
  assert blocks.RESAMPLE['down'] is layers.downsample
  assert blocks.RESAMPLE['up'] is layers.upsample


# Widths and blocks of the levels, super-resolution, tensors, parameters / 1e6.
PUBLISHED = {
  'IF-I-L': ((320, 640, 960, 1280), 3, False, 775, 935.4),
  'IF-I-XL': ((704, 1408, 2112, 2816), 3, False, 775, 4304.7),
  'IF-II-M': ((128, 256, 512, 768, 768), (2, 2, 3, 4, 2), True, 721, 461.1),
  'IF-II-L': ((160, 320, 640, 960, 1280), (2, 2, 3, 5, 5), True, 939, 1243.3),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', PUBLISHED)
def test_networks_have_the_published_sizes(name):
  channels, per_block, upsamples, tensors, millions = PUBLISHED[name]
  plain = 3 if upsamples else 1
  down = [tiny_if.PLAIN] * plain
  down += [tiny_if.ATTENDS] * (len(channels) - plain)
  raw = tiny_if.COMMON | {
    'in_channels': 6 if upsamples else 3,
    'layers_per_block': per_block,
    'block_out_channels': channels,
    'down_block_types': down,
    'up_block_types': [tiny_if.UP[name] for name in reversed(down)],
    'attention_head_dim': 64,
    'addition_embed_type_num_heads': 64,
    'cross_attention_dim': channels[-1],
    'encoder_hid_dim': 4096,
    'class_embed_type': 'timestep' if upsamples else None,
    'time_embedding_dim': channels[-1] if upsamples else None,
  }
  leaves = jax.tree.leaves(weights.abstract_params(config.parse(raw)))
  assert len(leaves) == tensors
  count = sum(math.prod(leaf.shape) for leaf in leaves)
  assert round(count / 1e6, 1) == millions
