"""Decodes every image that enters, for training or sampling, in the same way.

Images are turned upright (EXIF), composited on white where transparent, and
converted to 8-bit RGB; an animation gives its first frame. Then the central
square is downsampled with antialiasing. Size and format are read from the
header first, so that a file that would unpack to gigabytes is rejected.
"""

import io
import warnings
from typing import IO, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from imagen_jax.io.files import AnyPath

Box: TypeAlias = tuple[int, int, int, int]
# An image file: its bytes, its path, or the open file.
Encoded: TypeAlias = bytes | AnyPath | IO[bytes]

# Pillow supports more formats, some of which run other programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')
MAX_PIXELS = 2**26  # 67 million: 201 MB as RGB
_HUGE = f'it has more than {MAX_PIXELS / 1e6:.0f} million pixels'
MIN_SIDE = 8  # below this, an image is a line or a tracking pixel
RESIZE = {
  'area': Image.Resampling.BOX,
  'bicubic': Image.Resampling.BICUBIC,
  'lanczos': Image.Resampling.LANCZOS,
}
# Pillow only warns about sizes that are rejected here.
warnings.simplefilter('ignore', Image.DecompressionBombWarning)


class BadSample(Exception):
  """An image or caption cannot be used; the message is a clause with why."""


def decode(
  data: Encoded, size: int, resize: str = 'area'
) -> UInt8[np.ndarray, '{size} {size} 3']:
  """Decodes an image: upright, on white, square.

  Args:
    data: the file's bytes, its path, or an open file.
    size: side in pixels, at most the image's shorter one.
    resize: 'area' (the mean over each target pixel's area), 'bicubic' or
      'lanczos'; all antialiased.

  Raises:
    BadSample: it is damaged, unsupported, too large to unpack, or too small.
  """
  with opened(data) as image:
    if min(image.size) < size:
      raise BadSample(f'it is smaller than {size} pixels')
    return resize_square(upright(image), size, resize)


def inspect(data: Encoded) -> tuple[int, int]:
  """(width, height) of an image, which is decoded completely as a check.

  Raises:
    BadSample: as `decode`.
  """
  with opened(data) as image:
    size = image.size
    upright(image)
  return size


def resize_square(
  image: Image.Image, size: int, resize: str = 'area'
) -> UInt8[np.ndarray, '{size} {size} 3']:
  """The central square of an RGB Pillow image, as pixels."""
  return np.asarray(fit(image, size, size, resize))


def central(size: tuple[int, int], width: int, height: int) -> Box:
  """The largest central box of aspect ratio width : height.

  Args:
    size: (width, height) of the whole in pixels.
    width, height: the aspect ratio.

  Returns:
    (left, top, right, bottom).
  """
  whole_width, whole_height = size
  inner_width = min(whole_width, round(whole_height * width / height) or 1)
  inner_height = min(whole_height, round(whole_width * height / width) or 1)
  left = (whole_width - inner_width) // 2
  top = (whole_height - inner_height) // 2
  return left, top, left + inner_width, top + inner_height


def fit(
  image: Image.Image, width: int, height: int, resize: str = 'area'
) -> Image.Image:
  """An image's central part of the target's aspect ratio, resized to it."""
  # Pillow scales each kernel with the ratio, so all three antialias; BOX is
  # the mean over the target pixel's area, including fractions of pixels.
  box = central(image.size, width, height)
  return image.resize((width, height), RESIZE[resize], box=box)


def opened(data: Encoded, min_side: int = MIN_SIDE) -> Image.Image:
  """Opens an image and checks its header; pixels are not read yet.

  Raises:
    BadSample: it is none, of a format not in `FORMATS`, too large or too small.
  """
  if isinstance(data, bytes):
    if not data:
      raise BadSample('it is empty')
    data = io.BytesIO(data)
  try:
    image = Image.open(data, formats=FORMATS)
  except FileNotFoundError as error:
    raise BadSample('it does not exist') from error
  except Image.DecompressionBombError:
    raise BadSample(_HUGE) from None
  except Exception as error:  # each Pillow reader raises its own
    raise BadSample('it cannot be read as an image') from error
  width, height = image.size
  problem = None
  if width * height > MAX_PIXELS:
    problem = _HUGE
  elif min(width, height) < min_side:
    problem = f'it is less than {min_side} pixels wide or high'
  elif image.mode == 'F':
    problem = 'its pixels have no fixed range (floating point)'
  if problem:
    image.close()
    raise BadSample(problem)
  return image


def upright(image: Image.Image, background: str = 'white') -> Image.Image:
  """Decodes a Pillow image: upright, RGB, transparency on `background`.

  Raises:
    BadSample: it is damaged.
  """
  try:
    # Cameras store the sensor's rows and the orientation in EXIF.
    return _rgb(ImageOps.exif_transpose(image), background)
  except Exception as error:  # each Pillow reader raises its own
    raise BadSample('it cannot be decoded') from error


def _rgb(image: Image.Image, background: str) -> Image.Image:
  """Converts any Pillow mode to RGB, where convert('RGB') alone is wrong."""
  if image.mode.startswith('I'):
    # 16-bit grey; convert would clip everything above 255 to white.
    grey = np.clip(np.asarray(image, np.float32) / 257, 0, 255)
    image = Image.fromarray(np.rint(grey).astype(np.uint8))
  elif image.has_transparency_data:
    # convert would show the hidden colour of transparent pixels.
    image = image.convert('RGBA')
    behind = Image.new('RGBA', image.size, background)
    image = Image.alpha_composite(behind, image)
  return image.convert('RGB')
