"""Images on disk: PNG files that carry how they were made, and grids."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, PngImagePlugin

from imagen_jax.errors import DataError

AnyPath: TypeAlias = str | os.PathLike[str]
METADATA_KEY = 'imagen_jax'


def grid(
  images: UInt8[np.ndarray, 'b h w c'],
  columns: int | None = None,
  *,
  pad: int = 2,
) -> UInt8[np.ndarray, 'grid_h grid_w c']:
  """Images side by side on white, `pad` pixels apart."""
  count, height, width, channels = images.shape
  columns = columns or int(np.ceil(np.sqrt(count)))
  rows = -(-count // columns)
  shape = (
    rows * (height + pad) - pad,
    columns * (width + pad) - pad,
    channels,
  )
  canvas = np.full(shape, 255, np.uint8)
  for i, image in enumerate(images):
    y = (i // columns) * (height + pad)
    x = (i % columns) * (width + pad)
    canvas[y : y + height, x : x + width] = image
  return canvas


def upsample(
  images: UInt8[np.ndarray, 'b h w c'], min_side: int
) -> UInt8[np.ndarray, 'b big_h big_w c']:
  """Repeats pixels until images are at least `min_side` wide."""
  factor = -(-min_side // images.shape[2])
  return images.repeat(factor, axis=1).repeat(factor, axis=2)


def save_png(
  path: AnyPath,
  image: UInt8[np.ndarray, 'h w 3'],
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes an image with `metadata` (a JSON object) in a tEXt chunk.

  The prompt stands in its own chunk too, so that other programs show it.
  """
  info = PngImagePlugin.PngInfo()
  if metadata is not None:
    if 'prompt' in metadata:
      info.add_itxt('prompt', metadata['prompt'])
    info.add_text(METADATA_KEY, json.dumps(metadata))
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path, 'PNG', pnginfo=info)


def read_metadata(path: AnyPath) -> dict[str, Any]:
  """The JSON object that `save_png` put into an image.

  Raises:
    DataError: when the file is no image, or carries no such record.
  """
  try:
    with Image.open(path) as image:
      record = dict(getattr(image, 'text', {})).get(METADATA_KEY)
  except OSError as error:
    raise DataError(f'{path} cannot be read as an image ({error}).') from error
  if record is None:
    raise DataError(
      f'{path} carries no record of how it was made; only PNG files written '
      'by sample.py can be reproduced.'
    )
  return json.loads(record)


def read_image(
  path: AnyPath, size: int
) -> UInt8[np.ndarray, '{size} {size} 3']:
  """A user's image: its central square, box-resized.

  Raises:
    DataError: when the file is no image or smaller than `size`.
  """
  from imagen_jax.io import decode

  try:
    return decode.decode(path, size)
  except decode.BadSample as error:
    raise DataError(
      f'{path} cannot be used as an image of {size} pixels: {error}.'
    ) from error


def read_low_res(
  path: AnyPath, side: int, multiple: int
) -> UInt8[np.ndarray, 'h w 3']:
  """A user's image for a stage to upsample.

  Its shape is kept, but for what is cut off to make both sides whole
  multiples.

  Args:
    path: of the file.
    side: of the shorter side of the result.
    multiple: of both its sides.

  Raises:
    DataError: it is no image, or smaller than `side`.
  """
  image = open_image(path)
  width, height = shaped(*image.size, side, multiple)
  if width == height:
    return read_image(path, side)
  if min(image.size) < side:
    raise DataError(
      f'{path} cannot be used as an image of {side} pixels: it is '
      f'{image.width}×{image.height} pixels, smaller than that.'
    )
  return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BOX))


def open_image(path: AnyPath, mode: str = 'RGB') -> Image.Image:
  """An image file as a PIL image of any shape.

  Raises:
    DataError: it is no image.
  """
  try:
    with Image.open(path) as image:
      return image.convert(mode)
  except OSError as error:
    raise DataError(f'{path} cannot be read as an image ({error}).') from error


def shaped(
  width: int, height: int, side: int, multiple: int = 8
) -> tuple[int, int]:
  """(width, height) with `side` as the short one, both in whole multiples."""
  ratio = width / height
  if ratio >= 1:
    return round(side / multiple * ratio) * multiple, side
  return side, round(side / multiple / ratio) * multiple


def to_float(
  image: Image.Image, width: int, height: int
) -> Float32[np.ndarray, '{height} {width} 3']:
  """A PIL image as numbers in [−1, 1].

  Bicubic where its size changes, every pixel kept where not.
  """
  if image.size != (width, height):
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(image.convert('RGB'), np.float32) / 127.5 - 1


def to_mask(
  image: Image.Image, width: int, height: int
) -> Float32[np.ndarray, '{height} {width} 1']:
  """A PIL image as an inpaint mask: 1 where it is bright, 0 elsewhere."""
  image = image.convert('L')
  if image.size != (width, height):
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  return (np.asarray(image)[..., None] >= 127.5).astype(np.float32)
