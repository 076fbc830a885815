"""Decodes every image that enters, for training or sampling, in the same way.

Images are turned upright (EXIF), composited on white where transparent, and
converted to 8-bit RGB; an animation gives its first frame. Then the central
square, or a box of another shape, is downsampled with antialiasing. Size and
format are read from the header first, so that a file that would unpack to
gigabytes is rejected.
"""

import functools
import io
import warnings
from typing import IO, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from scipy import sparse

from imagen_jax.io.aspect import nearest
from imagen_jax.io.files import AnyPath

Box: TypeAlias = tuple[int, int, int, int]
# An image file: its bytes, its path, or the open file.
Encoded: TypeAlias = bytes | AnyPath | IO[bytes]

# Pillow supports more formats, some of which run other programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')
MAX_PIXELS = 2**26  # 67 million: 201 MB as RGB
_HUGE = f'it has more than {MAX_PIXELS / 1e6:.0f} million pixels'
ORIENTATION = 0x112  # of EXIF: 5 to 8 are turned by 90°
MIN_SIDE = 8  # below this, an image is a line or a tracking pixel
RESIZE = ('area', 'bicubic', 'lanczos')
# Version of `RESIZE`, recorded with prepared images.
RESIZING = 'exact-area-1'
WHOLE = 2**26  # bytes of a file that are read at once
BAND = 2**18  # pixels that `area` holds as floats at a time
# Pillow only warns about sizes that are rejected here.
warnings.simplefilter('ignore', Image.DecompressionBombWarning)


class BadSample(Exception):
  """An image or caption cannot be used; the message is a clause with why."""


def decode(
  data: Encoded, size: int, resize: str = 'area', aspect: str = 'crop'
) -> UInt8[np.ndarray, 'h w 3']:
  """Decodes an image: upright, on white, of one of the shapes of a size.

  Args:
    data: the file's bytes, its path, or an open file.
    size: side in pixels, for which the image must be large enough.
    resize: 'area' (the mean over each target pixel's area), 'bicubic' or
      'lanczos'; all antialiased.
    aspect: see `aspect.shapes`.

  Raises:
    BadSample: it is damaged, unsupported, too large to unpack, or too small.
  """
  return np.asarray(fitted(data, size, resize, aspect))


def fitted(
  data: Encoded, size: int, resize: str = 'area', aspect: str = 'crop'
) -> Image.Image | UInt8[np.ndarray, 'h w 3']:
  """`decode`, as a Pillow image where that is what there is.

  Pillow keeps four bytes a pixel, so each way costs as much as to halve it.

  Returns:
    the opened image itself, which has a `format`, if nothing had to be changed.
  """
  with opened(data) as image:
    # Not block by block, whose unfinished rows are decoded twice.
    image.decodermaxblock = WHOLE  # type: ignore[attr-defined]
    shape = nearest(upright_size(image), size, aspect)
    if shape is None:
      raise BadSample(f'it is smaller than {size} pixels')
    height, width = shape
    if aspect == 'pad':
      return padded(upright(image), size, resize)
    return _fit(upright(image), width, height, resize)


def inspect(data: Encoded) -> tuple[int, int]:
  """(width, height) of an image, which is decoded completely as a check.

  Raises:
    BadSample: as `decode`.
  """
  with opened(data) as image:
    return upright(image).size


def upright_size(image: Image.Image) -> tuple[int, int]:
  """(width, height) of an opened image when it is upright; decodes nothing."""
  width, height = image.size
  try:
    turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
  except Exception:  # damaged EXIF, of which `upright` tells
    turned = False
  return (height, width) if turned else (width, height)


def padded(
  image: Image.Image, size: int, resize: str = 'area'
) -> UInt8[np.ndarray, '{size} {size} 3']:
  """A whole RGB image, resized, in the middle of a white square."""
  scale = size / max(image.size)
  width, height = (max(1, round(n * scale)) for n in image.size)
  square = np.full((size, size, 3), 255, np.uint8)
  top, left = (size - height) // 2, (size - width) // 2
  inner = fit(image, width, height, resize)
  square[top : top + height, left : left + width] = inner
  return square


def resize_square(
  image: Image.Image, size: int, resize: str = 'area'
) -> UInt8[np.ndarray, '{size} {size} 3']:
  """The central square of an RGB Pillow image, as pixels."""
  return fit(image, size, size, resize)


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
) -> UInt8[np.ndarray, '{height} {width} ...']:
  """An image's central part of the target's aspect ratio, resized to it.

  Args:
    image: RGB or grey.
    width, height: of the result.
    resize: as in `decode`; an image that is too small is upsampled by bicubic.
  """
  return np.asarray(_fit(image, width, height, resize))


def _fit(
  image: Image.Image, width: int, height: int, resize: str
) -> Image.Image | UInt8[np.ndarray, '{height} {width} ...']:
  if image.size == (width, height):
    return image
  box = central(image.size, width, height)
  if width > box[2] - box[0]:
    resize = 'bicubic'
  if resize == 'area':
    return _area(image, width, height, box)
  # Pillow scales the kernels with the ratio: they antialias.
  kernel = Image.Resampling[resize.upper()]
  return image.resize((width, height), kernel, box)


def _area(
  image: Image.Image, width: int, height: int, box: Box
) -> Image.Image | UInt8[np.ndarray, '{height} {width} ...']:
  """The mean over each target pixel's area, fractions of pixels included.

  Pillow's BOX is not that mean: it counts a pixel whole or not at all.
  """
  left, top, right, bottom = box
  inner_width, inner_height = right - left, bottom - top
  whole = not (inner_width % width or inner_height % height)
  factors = inner_width // width, inner_height // height
  if whole and (factors[0] * factors[1]).bit_count() == 1:
    # Pillow's means of blocks are exact, and faster, for powers of two.
    return image.reduce(factors, box)
  # Band by band, because floats take four times the memory of an image.
  rows = max(1, BAND // inner_width * height // inner_height)
  _, _, across = _overlaps(inner_width, width, 0, width)
  bands = []
  for start in range(0, height, rows):
    stop = min(start + rows, height)
    first, last, down = _overlaps(inner_height, height, start, stop)
    x = np.asarray(image.crop((left, top + first, right, top + last)))
    x = _means(across, _means(down, x).swapaxes(0, 1)).swapaxes(0, 1)
    bands.append((x + np.float32(0.5)).astype(np.uint8))
  return np.concatenate(bands)


def _means(weights: sparse.csr_array, x: np.ndarray) -> np.ndarray:
  """Weighted means of the rows of x: [p, q, ...] -> [n, q, ...]."""
  return (weights @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])


@functools.lru_cache(maxsize=256)
def _overlaps(
  size: int, target: int, start: int, stop: int
) -> tuple[int, int, sparse.csr_array]:
  """Weights of `size` pixels in the means of target pixels start … stop − 1.

  Returns:
    (first, last, the weights of pixels first … last − 1, float32).
  """
  # In units in which a pixel is `target` long and a target pixel `size`.
  first, last = start * size // target, -(-stop * size // target)
  edges = np.arange(start, stop + 1) * size
  cuts = np.union1d(edges, np.arange(first + 1, last) * target)
  weights = (np.diff(cuts) / size).astype(np.float32)
  columns = cuts[:-1] // target - first
  entries = weights, columns, np.searchsorted(cuts, edges)
  return first, last, sparse.csr_array(entries, (stop - start, last - first))


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

  Returns:
    the image itself if it is all that.

  Raises:
    BadSample: it is damaged.
  """
  try:
    # Cameras store the sensor's rows and the orientation in EXIF. A copy that
    # is not needed would take as long as resizing.
    if image.getexif().get(ORIENTATION, 1) != 1:
      image = ImageOps.exif_transpose(image)
    return _rgb(image, background)
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
  image.load()
  return image if image.mode == 'RGB' else image.convert('RGB')
