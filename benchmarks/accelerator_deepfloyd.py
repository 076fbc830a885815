"""DeepFloyd IF's stage I, guided, with random weights in bfloat16."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_work import call_times, median, random_tree

from imagen_jax.deepfloyd import config, schedule, stage, unet, weights

GUIDANCE = 7.0
TOKENS, LEVELS = 77, 4
# The published `unet/config.json` of IF-I-XL-v1.0, without what is a default.
XL = {
  '_class_name': 'UNet2DConditionModel',
  'act_fn': 'gelu',
  'addition_embed_type': 'text',
  'addition_embed_type_num_heads': 64,
  'attention_head_dim': 64,
  'block_out_channels': [704, 1408, 2112, 2816],
  'cross_attention_dim': 2816,
  'cross_attention_norm': 'group_norm',
  'down_block_types': [
    'ResnetDownsampleBlock2D',
    *['SimpleCrossAttnDownBlock2D'] * (LEVELS - 1),
  ],
  'encoder_hid_dim': 4096,
  'encoder_hid_dim_type': 'text_proj',
  'in_channels': 3,
  'layers_per_block': 3,
  'mid_block_type': 'UNetMidBlock2DSimpleCrossAttn',
  'out_channels': 6,
  'resnet_time_scale_shift': 'scale_shift',
  'sample_size': 64,
  'up_block_types': [
    *['SimpleCrossAttnUpBlock2D'] * (LEVELS - 1),
    'ResnetUpsampleBlock2D',
  ],
}
TINY = XL | {
  'addition_embed_type_num_heads': 2,
  'attention_head_dim': 8,
  'block_out_channels': [16, 32],
  'norm_num_groups': 4,
  'cross_attention_dim': 32,
  'down_block_types': XL['down_block_types'][:2],
  'encoder_hid_dim': 32,
  'layers_per_block': 1,
  'sample_size': 8,
  'up_block_types': XL['up_block_types'][-2:],
}
# Its `scheduler/scheduler_config.json`.
SCHEDULE = {
  'beta_schedule': 'squaredcos_cap_v2',
  'variance_type': 'learned_range',
  'thresholding': True,
  'dynamic_thresholding_ratio': 0.95,
  'sample_max_value': 1.5,
}


def sizes(given: Mapping[str, Any], rehearse: bool) -> tuple[dict, int, int]:
  """(config.json, images, steps)."""
  return (TINY, 2, 2) if rehearse else (XL, given['batch'], given['steps'])


def texts(images: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Noise for the embeddings of the prompts and of the empty prompt."""
  rng = np.random.default_rng(0)
  one, other = rng.normal(size=(2, images, TOKENS, width)).astype(np.float32)
  return one, other


def answer(
  who: str, images: int, steps: int, seconds: list[float]
) -> dict[str, Any]:
  """The numbers of a row, from the seconds of its calls."""
  return {
    'who': who,
    'batch': images,
    'steps': steps,
    'seconds': median(seconds),
    'times': seconds,
  }


class Work:
  """All steps of a batch of images."""

  def __init__(self, given: Mapping[str, Any], rehearse: bool) -> None:
    raw, self._batch, steps = sizes(given, rehearse)
    self._who, self._steps, self._rehearse = given['who'], steps, rehearse
    made, sampled = config.parse(raw), schedule.parse(SCHEDULE)
    self._shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
      weights.abstract_params(made),
    )
    text, uncond = texts(self._batch, raw['encoder_hid_dim'])
    keys = jax.random.split(jax.random.key(0), self._batch)
    self._inputs = stage.SampleInputs(
      text=jnp.asarray(text),
      keys=jax.random.key_data(keys),
      uncond=jnp.asarray(uncond),
      guidance=np.float32(GUIDANCE),
    )
    self._plan = schedule.plan(sampled, schedule.timesteps(sampled, steps))
    side = raw['sample_size']
    self._static = {
      'module': unet.IFUNet(made, jnp.bfloat16),
      'made': sampled,
      'shape': (side, side, 3),
    }

  def compile(self) -> None:
    lowered = stage.jitted().lower(
      self._shapes, self._inputs, self._plan, **self._static
    )
    self._run = lowered.compile()

  def measure(self) -> dict[str, Any]:
    params = random_tree(self._shapes)
    run = lambda: self._run(params, self._inputs, self._plan)
    seconds = call_times(run, self._rehearse)
    return answer(self._who, self._batch, self._steps, seconds)
