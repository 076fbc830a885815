"""The shapes that images get: squares, or a few of nearly equal area.

With buckets, an image is cropped to the shape with the nearest aspect ratio,
so that little of it is lost. The shapes are whole eighths of `size`: those of
256 pixels are four times those of 64, as a cascade needs them.
"""

import functools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Int, Int8

from imagen_jax.errors import UsageError, check_choice

Shape: TypeAlias = tuple[int, int]  # height, width in pixels

ASPECTS = ('crop', 'pad', 'buckets')
# Sides in eighths of `size`, of 60 to 64 cells; with their transposes.
CELLS = ((8, 8), (7, 9), (6, 10), (5, 12), (4, 16))
SMALL = -1  # the number of no shape


def shapes(size: int, aspect: str = 'crop') -> tuple[Shape, ...]:
  """The shapes of images of a size.

  Args:
    size: side of a square, in pixels.
    aspect: 'crop' (the central square), 'pad' (the whole image on a white
      square) or 'buckets' (of equal area, the nearest one's crop).

  Raises:
    UsageError: there is no such way, or 8 does not divide the size.
  """
  check_choice('data.aspect', aspect, ASPECTS, key='config.data.aspect')
  if aspect != 'buckets':
    return ((size, size),)
  if size % 8:
    raise UsageError(
      f'data.aspect=buckets needs images whose size is a multiple of 8, not '
      f'{size}.',
      key='config.data.aspect',
    )
  cells = sorted({*CELLS, *(cell[::-1] for cell in CELLS)})
  return tuple((h * size // 8, w * size // 8) for h, w in cells)


def choose(
  sizes: Int[np.ndarray, 'n 2'] | Sequence[Sequence[int]],
  size: int,
  aspect: str = 'crop',
) -> Int8[np.ndarray, ' n']:
  """The numbers, among `shapes`, of the shapes of images.

  Args:
    sizes: widths and heights of the images in pixels.
    size, aspect: see `shapes`.

  Returns:
    `SMALL` for an image that would have to be upsampled.
  """
  width, height = np.asarray(sizes).reshape(-1, 2).T
  if aspect != 'buckets':
    side = (np.maximum if aspect == 'pad' else np.minimum)(width, height)
    return np.where(side >= size, np.int8(0), np.int8(SMALL))
  found = np.full(len(width), SMALL, np.int8)
  least = np.full(len(width), np.inf)
  width, height = width.astype(np.int64), height.astype(np.int64)
  for number, (h, w) in enumerate(shapes(size, aspect)):
    # Ratio of the aspect ratios, ≥ 1; products of integers are exact anywhere.
    ratio = width * h / (height * w)
    ratio = np.maximum(ratio, 1 / ratio)
    nearer = ratio < least
    large = (width >= w) & (height >= h)
    found = np.where(nearer, np.where(large, number, SMALL), found)
    least = np.minimum(ratio, least)
  return found.astype(np.int8)


@functools.lru_cache(2**14)
def nearest(pixels: tuple[int, int], size: int, aspect: str) -> Shape | None:
  """The shape of an image of (width, height) pixels; None: it is too small."""
  (number,) = choose([pixels], size, aspect)
  return None if number == SMALL else shapes(size, aspect)[number]
