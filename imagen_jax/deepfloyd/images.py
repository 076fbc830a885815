"""IF's bilinear upsampling, and aspect ratios."""

import jax.numpy as jnp

from imagen_jax.errors import UsageError
from imagen_jax.typing import Image, LowRes


def upsample(image: LowRes, height: int, width: int) -> Image:
  """Bilinear with aligned corners: [B, h, w, C] -> [B, height, width, C].

  This is torch's align_corners=True, which IF's stage II was trained with;
  `jax.image.resize` aligns pixel edges instead.
  """
  for axis, size in ((1, height), (2, width)):
    old = image.shape[axis]
    position = jnp.linspace(0.0, old - 1.0, size)
    low = jnp.clip(position.astype(jnp.int32), 0, max(old - 2, 0))
    fraction = (position - low).reshape(
      [-1 if a == axis else 1 for a in range(4)]
    )
    first = jnp.take(image, low, axis=axis)
    second = jnp.take(image, jnp.minimum(low + 1, old - 1), axis=axis)
    image = first * (1 - fraction) + second * fraction
  return image


def parse_aspect(text: str) -> tuple[int, int]:
  """'16:9' as (16, 9).

  Raises:
    UsageError: it is not two positive numbers.
  """
  try:
    width, height = (int(part) for part in text.split(':'))
    if width < 1 or height < 1:
      raise ValueError
  except ValueError:
    raise UsageError(
      f'{text!r} is not understood; give width:height such as 3:2.',
      key='aspect_ratio',
    ) from None
  return width, height
