"""The sample grid of a training run, sampled with the EMA parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from imagen_jax import sharding
from imagen_jax.cascade import conditioning
from imagen_jax.io import images as image_io
from imagen_jax.io.decode import fit
from imagen_jax.training.experiment import Experiment

NUM_PREVIEWS = 8


def make_image_preview(
  experiment: Experiment,
  sample: Callable,
  embed: Callable[[list[dict]], dict],
  frozen: Any,
  *,
  low_resolution: int | None = None,
) -> Callable[[Any], np.ndarray | None]:
  """A function that samples a few images for held-out captions.

  The grid's rows are the data set's images, the low-resolution inputs (for a
  super-resolution stage only), and the samples.

  Args:
    experiment: whose eval split and mesh are used.
    sample: (params, arrays, frozen) -> [B, R, R, 3] in [−1, 1]. The arrays are
      `embed`'s, `keys` (key data, the same for every grid) and, for a
      super-resolution stage, `low` [B, r, r, 3].
    embed: examples -> arrays that condition the network.
    frozen: of the experiment, on the mesh.
    low_resolution: side r of the low-resolution images, None for a base model.

  Returns:
    EMA parameters -> uint8 [H, W, 3], or None off process 0. Every process
    must call it.
  """
  mesh, source = experiment.mesh, experiment.source('eval')
  shown = min(NUM_PREVIEWS, len(source))
  # Repeat the first images until the devices divide their number.
  count = -(-shown // mesh.size) * mesh.size
  # A source with buckets is in the order of its shapes: take some of each, and
  # show squares.
  stride = len(source) // shown if source.buckets else 1
  examples = [source[i % shown * stride] for i in range(count)]
  side = experiment.resolution
  shown_at = lambda example: fit(Image.fromarray(example['image']), side, side)
  truth = np.stack([*map(shown_at, examples)])
  keys = jax.random.split(jax.random.key(experiment.config.seed), count)
  given = embed(examples)
  given['keys'] = np.asarray(jax.random.key_data(keys))
  rows = [truth[:shown]]
  if low_resolution is not None:
    x = jnp.asarray(truth, jnp.float32) / 127.5 - 1
    given['low'] = np.asarray(conditioning.box_downsample(x, low_resolution))
    small = conditioning.to_uint8(given['low'][:shown])
    factor = truth.shape[1] // low_resolution
    rows.append(small.repeat(factor, axis=1).repeat(factor, axis=2))

  def preview(ema_params: Any) -> np.ndarray | None:
    arrays = sharding.put_whole_batch(given, mesh)
    sampled = sharding.fetch(sample(ema_params, arrays, frozen))
    if jax.process_index() != 0:
      return None
    images = np.concatenate([*rows, conditioning.to_uint8(sampled[:shown])])
    return image_io.grid(image_io.upsample(images, 64), shown)

  return preview
