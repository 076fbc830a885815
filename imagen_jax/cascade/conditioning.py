"""The conditioning of a stage: low-resolution images, text or the null text.

Training and sampling use the same functions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from imagen_jax.cascade.stage import Stage
from imagen_jax.diffusion import process
from imagen_jax.typing import (
  Array,
  AugLevel,
  Image,
  LowRes,
  TextEmb,
  TextMask,
)


def box_downsample(image: Image, size: int) -> LowRes:
  """Downsamples images by the mean of each box.

  Args:
    image: [B, H, W, C], H a multiple of `size`.
    size: height of the result.
  """
  batch, height, width, channels = image.shape
  factor = height // size
  image = image.reshape(
    batch, height // factor, factor, width // factor, factor, channels
  )
  return jnp.mean(image, axis=(2, 4))


def upsample(image: LowRes, factor: int) -> Image:
  """Bilinear upsampling of the low-resolution input: [B, h, w, C]."""
  batch, height, width, channels = image.shape
  return jax.image.resize(
    image, (batch, height * factor, width * factor, channels), 'linear'
  )


def to_uint8(image: Float[Array, '*b h w c']) -> UInt8[np.ndarray, '*b h w c']:
  """float [..., 3] in [−1, 1] -> numpy uint8, rounded to nearest."""
  image = (np.asarray(image, np.float32) + 1) * 127.5
  return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def low_res_input(
  stage: Stage, eps: LowRes, low: LowRes, level: AugLevel
) -> Image:
  """The low-resolution condition, augmented, then upsampled (2.4).

  Args:
    stage: a super-resolution stage.
    eps: standard normal noise of the shape of `low`.
    low: [B, h, w, 3] in [−1, 1].
    level: [B] augmentation level in [0, 1].

  Returns:
    [B, H, W, 3] at the stage's resolution.
  """
  return upsample(process.augment(eps, low, level), stage.factor)


def null_where(
  dropped: Bool[Array, ' b'], text: TextEmb, mask: TextMask
) -> tuple[TextEmb, TextMask]:
  """Replaces the text by the null condition where `dropped` [B] is True.

  The sequence is zeroed and every position masked, so that neither the words
  nor the length of the caption remain (4.1: "zeroing out the text
  embeddings"). The pooled vector is then exactly zero too.
  """
  text = jnp.where(dropped[:, None, None], 0, text)
  return text, mask & ~dropped[:, None]
