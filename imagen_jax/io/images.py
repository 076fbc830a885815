"""Image files: PNG with metadata, grids, and users' input images."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, PngImagePlugin

from imagen_jax.errors import DataError
from imagen_jax.io import decode, files
from imagen_jax.io.files import AnyPath

METADATA_KEY = 'imagen_jax'
GAP = 2  # pixels between the images of a grid


def grid(
  images: UInt8[np.ndarray, 'b h w c'], columns: int | None = None
) -> UInt8[np.ndarray, 'grid_h grid_w c']:
  """Images side by side on white, `GAP` pixels apart."""
  columns = columns or math.ceil(math.sqrt(len(images)))
  rows = -(-len(images) // columns)
  white = ((0, rows * columns - len(images)), (0, GAP), (0, GAP), (0, 0))
  cells = np.pad(images, white, constant_values=255)
  _, height, width, channels = cells.shape
  cells = cells.reshape(rows, columns, height, width, channels)
  canvas = cells.swapaxes(1, 2).reshape(rows * height, -1, channels)
  return canvas[:-GAP, :-GAP]


def upsample(
  images: UInt8[np.ndarray, 'b h w c'], min_side: int
) -> UInt8[np.ndarray, 'b big_h big_w c']:
  """Repeats pixels so that images are at least `min_side` pixels wide."""
  factor = -(-min_side // images.shape[2])
  return images.repeat(factor, axis=1).repeat(factor, axis=2)


def save_png(
  path: AnyPath,
  image: UInt8[np.ndarray, 'h w 3'],
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes an image with `metadata` (a JSON object) in a tEXt chunk.

  The prompt also has a chunk of its own, which other programs show.
  """
  info = PngImagePlugin.PngInfo()
  if metadata is not None:
    if 'prompt' in metadata:
      info.add_itxt('prompt', metadata['prompt'])
    info.add_text(METADATA_KEY, json.dumps(metadata))
  with files.replacing(path) as temporary:
    Image.fromarray(image).save(temporary, 'PNG', pnginfo=info)


def read_metadata(path: AnyPath) -> dict[str, Any]:
  """The metadata that `save_png` stored in an image.

  Raises:
    DataError: the file is not an image, or has no such metadata.
  """
  try:
    with decode.opened(path, min_side=1) as image:
      text = dict(getattr(image, 'text', {})).get(METADATA_KEY)
  except (decode.BadSample, OSError, SyntaxError, ValueError) as error:
    raise DataError(f'{path} cannot be read as an image ({error}).') from error
  if text is None:
    raise DataError(
      f'{path} carries no record of how it was made; only PNG files written '
      'by sample.py can be reproduced.'
    )
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise DataError(
      f'the metadata of {path} is not JSON ({error}); it was changed.'
    ) from error
  if not isinstance(record, dict):
    raise DataError(
      f'the metadata of {path} is no JSON object; it was changed.'
    )
  return record


def read_low_res(
  path: AnyPath, side: int, multiple: int
) -> UInt8[np.ndarray, 'h w 3']:
  """Reads a user's image for a stage to upsample.

  Its aspect ratio is kept, up to a crop that makes both sides multiples.

  Args:
    path: of the file.
    side: length of the result's shorter side.
    multiple: both sides of the result are multiples of this.

  Raises:
    DataError: it is not an image, or smaller than `side`.
  """
  image = open_image(path)
  if min(image.size) < side:
    raise DataError(
      f'{path} cannot be used as an image of {side} pixels: it is '
      f'{image.width}×{image.height} pixels, smaller than that.'
    )
  return decode.fit(image, *shaped(*image.size, side, multiple))


def open_image(path: AnyPath, mode: str = 'RGB') -> Image.Image:
  """Opens an image file of any shape, decoded as for training.

  Args:
    path: of the file.
    mode: 'RGB', or 'L' for an inpaint mask, black where it is transparent.

  Raises:
    DataError: it is not an image, or one that `decode` refuses.
  """
  try:
    with decode.opened(path) as image:
      return upright(image, mode)
  except decode.BadSample as error:
    raise DataError(f'{path} cannot be used: {error}.') from error


def upright(image: Image.Image, mode: str = 'RGB') -> Image.Image:
  """A Pillow image as `open_image` gives it; may raise `BadSample`."""
  background = 'black' if mode == 'L' else 'white'
  return decode.upright(image, background).convert(mode)


def shaped(
  width: int, height: int, side: int, multiple: int = 8
) -> tuple[int, int]:
  """(width, height) scaled to shorter side `side`, rounded to `multiple`."""
  ratio = width / height
  if ratio >= 1:
    return round(side / multiple * ratio) * multiple, side
  return side, round(side / multiple / ratio) * multiple


def to_float(
  image: Image.Image, width: int, height: int, resize: str = 'area'
) -> Float32[np.ndarray, '{height} {width} 3']:
  """The central part of that aspect ratio of an RGB image, in [−1, 1]."""
  pixels = decode.fit(image, width, height, resize)
  return pixels.astype(np.float32) / 127.5 - 1


def to_mask(
  image: Image.Image, width: int, height: int
) -> Float32[np.ndarray, '{height} {width} 1']:
  """That part of a grey inpaint mask: 1 where it is bright, 0 elsewhere."""
  pixels = decode.fit(image, width, height)
  return (pixels[..., None] >= 127.5).astype(np.float32)
