"""The loss that a stage is trained with."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from imagen_jax.cascade.conditioning import (
  box_downsample,
  low_res_input,
  null_where,
)
from imagen_jax.cascade.stage import Stage
from imagen_jax.diffusion.loss import diffusion_loss
from imagen_jax.typing import (
  Array,
  Image,
  LogSNR,
  LowRes,
  PixelMask,
  TextEmb,
  TextMask,
  Uint8Image,
)


def loss(
  stage: Stage,
  params: dict,
  key: jax.Array,
  image: Uint8Image,
  text: TextEmb,
  mask: TextMask,
) -> tuple[LogSNR, dict[str, LogSNR]]:
  """The loss of each image of a batch (Appendix A; Sections 2.2 to 2.4).

  Args:
    stage: the stage.
    params: its parameters.
    key: one key for the whole batch.
    image: uint8 [B, R, R, 3] at the stage's resolution.
    text: [B, L, D] embeddings of the captions.
    mask: [B, L] bool.

  Returns:
    [B] float32, and a dict of [B]: t, logsnr, mse, weight.
  """
  keys = {
    name: jax.random.fold_in(key, i)
    for i, name in enumerate(['drop', 'level', 'low', 'crop', 'loss', 'net'])
  }
  batch = image.shape[0]
  x = image.astype(jnp.float32) / 127.5 - 1
  dropped = jax.random.bernoulli(keys['drop'], stage.cond_drop, (batch,))
  text, mask = null_where(dropped, text, mask)
  extra, weight = (), None
  if stage.low_resolution is not None:
    low = box_downsample(x, stage.low_resolution)
    if stage.crop is not None:
      x, low = crop(stage, keys['crop'], x, low)
    level = stage.max_level * jax.random.uniform(keys['level'], (batch,))
    eps = jax.random.normal(keys['low'], low.shape)
    extra = (low_res_input(stage, eps, low, level), level)
    if stage.contrast_floor is not None:
      weight = contrast_weight(low, stage.contrast_floor, x.shape[1])

  def predict(z, logsnr):
    return stage.net.apply(
      {'params': params},
      z,
      logsnr,
      text,
      mask,
      *extra,
      train=True,
      rngs={'dropout': keys['net']},
    )

  return diffusion_loss(
    keys['loss'],
    x,
    predict,
    logsnr_fn=stage.logsnr_fn,
    spec=stage.loss_spec,
    pixel_weight=weight,
  )


def contrast_weight(low: LowRes, floor: float, size: int) -> PixelMask:
  """Weights that make faint things count in the loss of a large image.

  A blurred edge costs the square of its contrast, so that white things on a
  light background stay clouds while black ones are still being polished. Each
  pixel is weighed with floor / (floor + c), c the variance of the small
  image's 3×3 pixels around it, mean over the channels. The network sees that
  image too, but for the augmentation's noise, so that what it should predict
  hardly changes. Not in the paper.

  Args:
    low: [B, h, h, 3], the small image in [−1, 1], without noise.
    floor: a variance, positive; the smaller, the more alike all edges count.
    size: side of the large image, a multiple of h.

  Returns:
    [B, size, size, 1] in (0, 1]; 1 where the small image is flat.
  """
  padded = jnp.pad(low, ((0, 0), (1, 1), (1, 1), (0, 0)), 'edge')
  mean = nn.avg_pool(padded, (3, 3))
  shifts = [
    padded[:, i : i + low.shape[1], j : j + low.shape[2]] - mean
    for i in range(3)
    for j in range(3)
  ]
  variance = sum(shift**2 for shift in shifts) / 9
  contrast = jnp.mean(variance, axis=-1, keepdims=True)
  weight = floor / (floor + contrast)
  factor = size // low.shape[1]
  return weight.repeat(factor, axis=1).repeat(factor, axis=2)


def crop(
  stage: Stage, key: jax.Array, x: Image, low: LowRes
) -> tuple[
  Float[Array, 'b crop crop c'], Float[Array, 'b low_crop low_crop c']
]:
  """The same random square of the image and of its small version."""
  side = stage.crop // stage.factor
  corners = jax.random.randint(key, (x.shape[0], 2), 0, low.shape[1] - side + 1)

  def cut(image, corner, size):
    start = (corner[0], corner[1], 0)
    return jax.lax.dynamic_slice(image, start, (size, size, 3))

  low = jax.vmap(functools.partial(cut, size=side))(low, corners)
  corners = corners * stage.factor
  x = jax.vmap(functools.partial(cut, size=stage.crop))(x, corners)
  return x, low
