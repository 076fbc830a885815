"""The loss that a stage is trained with."""

import functools

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.loss import diffusion_loss
from imagen_jax.stage.conditioning import (
  box_downsample,
  low_res_input,
  null_where,
)


def loss(stage, params, key, image, text, mask):
  """The loss of each picture of a batch (Appendix A; Sections 2.2 to 2.4).

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
  extra = ()
  if stage.low_resolution is not None:
    low = box_downsample(x, stage.low_resolution)
    if stage.crop is not None:
      x, low = crop(stage, keys['crop'], x, low)
    level = stage.max_level * jax.random.uniform(keys['level'], (batch,))
    eps = jax.random.normal(keys['low'], low.shape)
    extra = (low_res_input(stage, eps, low, level), level)

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
    prediction=stage.prediction,
    weighting=stage.weighting,
    stratified=stage.stratified,
  )


def crop(stage, key, x, low):
  """The same random square of the picture and of its small version."""
  factor = stage.resolution // stage.low_resolution
  side = stage.crop // factor
  corners = jax.random.randint(key, (x.shape[0], 2), 0, low.shape[1] - side + 1)

  def cut(image, corner, size):
    start = (corner[0], corner[1], 0)
    return jax.lax.dynamic_slice(image, start, (size, size, 3))

  low = jax.vmap(functools.partial(cut, size=side))(low, corners)
  x = jax.vmap(functools.partial(cut, size=stage.crop))(x, corners * factor)
  return x, low
