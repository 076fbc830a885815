"""The training loss of a stage."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.cascade import stage as stages
from imagen_jax.cascade.conditioning import (
  box_downsample,
  low_res_input,
  null_where,
)
from imagen_jax.cascade.stage import Stage
from imagen_jax.diffusion.loss import diffusion_loss
from imagen_jax.typing import (
  Array,
  AugLevel,
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
  t: LogSNR | None = None,
) -> tuple[LogSNR, dict[str, LogSNR]]:
  """The loss of each image of a batch (Appendix A; Sections 2.2 to 2.4).

  Args:
    stage: the stage.
    params: its parameters.
    key: one key for the whole batch.
    image: uint8 [B, R, R, 3] at the stage's resolution, or crops of such
      images whose corners are multiples of the stage's factor. The means of
      their boxes are then the crops of the low-resolution images.
    text: [B, L, D] embeddings of the captions.
    mask: [B, L] bool.
    t: [B] times; None samples them.

  Returns:
    [B] float32, and a dict of [B]: t, logsnr, mse, weight.
  """
  given = training_inputs(stage, key, image, text, mask)
  return diffusion_loss(
    given.keys['loss'],
    given.x,
    predictor(stage, params, given),
    logsnr_fn=stage.logsnr_fn,
    spec=stage.loss_spec,
    pixel_weight=given.weight,
    t=t,
  )


class TrainingInputs(NamedTuple):
  """What a stage is trained on, after the random choices of its conditioning.

  Attributes:
    keys: of the loss and of the network, by name.
    x: [B, R, R, 3] in [−1, 1].
    text, mask: [B, L, D] and [B, L], the null condition in some rows.
    low_res: for a super-resolution stage, the upsampled low-resolution images
      and their augmentation levels.
    weight: [B, R, R, 1], of the pixels; None is 1.
  """

  keys: dict[str, jax.Array]
  x: Image
  text: TextEmb
  mask: TextMask
  low_res: tuple[Image, AugLevel] | tuple[()] = ()
  weight: PixelMask | None = None


def training_inputs(
  stage: Stage,
  key: jax.Array,
  image: Uint8Image,
  text: TextEmb,
  mask: TextMask,
) -> TrainingInputs:
  """Drops captions, and augments low-resolution images; see `loss`."""
  # 3 was that of the crops, which are now cut where the images are read.
  numbers = {'drop': 0, 'level': 1, 'low': 2, 'loss': 4, 'net': 5}
  keys = {name: jax.random.fold_in(key, i) for name, i in numbers.items()}
  batch = image.shape[0]
  x = image.astype(jnp.float32) / 127.5 - 1
  dropped = jax.random.bernoulli(keys['drop'], stage.cond_drop, (batch,))
  text, mask = null_where(dropped, text, mask)
  if stage.low_resolution is None:
    return TrainingInputs(keys, x, text, mask)
  low = box_downsample(x, x.shape[1] // stage.factor)
  level = stage.max_level * jax.random.uniform(keys['level'], (batch,))
  eps = jax.random.normal(keys['low'], low.shape)
  weight = None
  if stage.contrast_floor is not None:
    weight = contrast_weight(low, stage.contrast_floor, x.shape[1])
  low_res = low_res_input(stage, eps, low, level), level
  return TrainingInputs(keys, x, text, mask, low_res, weight)


def predictor(
  stage: Stage, params: dict, given: TrainingInputs
) -> Callable[[Array, Array], Any]:
  """The network in training: (z [B, R, R, 3], logsnr [B]) -> its output."""

  def predict(z: Array, logsnr: Array) -> Any:
    arrays = z, logsnr, given.text, given.mask, *given.low_res
    rngs = {'dropout': given.keys['net']}
    return stages.apply(stage.net, params, *arrays, train=True, rngs=rngs)

  return predict


def contrast_weight(low: LowRes, floor: float, size: int) -> PixelMask:
  """Pixel weights that emphasise low-contrast edges in the loss.

  The loss of a blurred edge grows with the square of its contrast, so light
  objects on a light background stay blurred long after dark ones are sharp.
  The weight of a pixel is floor / (floor + c), where c is the variance of the
  3×3 low-resolution pixels around it, averaged over the channels. The network
  is conditioned on that image, up to the augmentation's noise, so the optimal
  prediction hardly changes. Not in the paper.

  Args:
    low: [B, h, h, 3], the low-resolution image in [−1, 1], without noise.
    floor: a variance > 0; the smaller, the more equally all edges count.
    size: side of the full-resolution image, a multiple of h.

  Returns:
    [B, size, size, 1] in (0, 1]; 1 where the low-resolution image is flat.
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
