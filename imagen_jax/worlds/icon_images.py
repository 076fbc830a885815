"""The images of icons: rasterised once, kept in the user's cache directory."""

import concurrent.futures
import contextlib
import io
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import files, paths
from imagen_jax.io.files import AnyPath

# Sides of the stored images, largest first: an icon is resized from the
# smallest that is large enough.
SIDES = (224, 112, 56)
VERSION = 1

# One image per icon at each of `SIDES`; transparent squares.
Levels = tuple[UInt8[np.ndarray, 'n s s 4'], ...]


def rasterise(data: bytes, side: int = SIDES[0]) -> Image.Image:
  """An icon as RGBA, cropped to what is visible and centred in a square.

  Args:
    data: SVG text, or an image file.
    side: of the square in pixels, which the icon fills in one direction.

  Raises:
    UsageError: it is an SVG, and resvg is not installed.
    ValueError, OSError: it is damaged, or there is nothing to see.
  """
  if data.lstrip()[:1] == b'<':
    try:
      import resvg_py
    except ModuleNotFoundError as error:
      raise UsageError(
        "SVG icons need resvg: pip install 'imagen_jax[icons]'."
      ) from error
    data = bytes(
      resvg_py.svg_to_bytes(
        svg_string=data.decode(),
        width=2 * side,
        height=2 * side,
        skip_system_fonts=True,
      )
    )
  icon = Image.open(io.BytesIO(data)).convert('RGBA')
  box = icon.getchannel('A').point(lambda a: 255 * (a > 16)).getbbox()
  if box is None:
    raise ValueError('it is empty')
  icon = icon.crop(box)
  scale = side / max(icon.size)
  width, height = (max(1, round(scale * n)) for n in icon.size)
  square = Image.new('RGBA', (side, side), (0, 0, 0, 0))
  resized = icon.resize((width, height), Image.Resampling.LANCZOS)
  square.paste(resized, ((side - width) // 2, (side - height) // 2))
  return square


def load(
  digest: str, names: Sequence[str], data: Callable[[int], bytes]
) -> Levels:
  """The images of icons, from the cache or rasterised.

  Args:
    digest: identifies all that they depend on.
    names: of the icons, for messages.
    data: index of an icon -> its SVG text or image file.

  Raises:
    DataError: an icon is damaged.
    UsageError: as `rasterise`.
  """
  base = paths.cache_folder()
  if base is None:
    return _levels(names, data)
  found = [base / 'icons' / f'{digest[:24]}-{side}.npy' for side in SIDES]
  with contextlib.suppress(OSError, ValueError):
    return opened(found)
  levels = _levels(names, data)
  with contextlib.suppress(OSError, ValueError):  # a full or read-only disk
    for path, level in zip(found, levels):
      with files.replacing(path) as temporary, temporary.open('wb') as file:
        np.save(file, level)
    return opened(found)
  return levels


def opened(paths: Iterable[AnyPath]) -> Levels:
  """The images of files that `load` has written, read when they are used."""
  return tuple(np.load(path, mmap_mode='r') for path in paths)


def _levels(names: Sequence[str], data: Callable[[int], bytes]) -> Levels:
  """Every icon at each of `SIDES`."""
  largest = np.empty((len(names), SIDES[0], SIDES[0], 4), np.uint8)

  def fill(i: int) -> None:
    try:
      largest[i] = np.asarray(rasterise(data(i)))
    except (ValueError, OSError) as error:
      raise DataError(
        f'the icon of {names[i]} cannot be read ({error}); fetch its package '
        'again.'
      ) from error

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(fill, range(len(names))))
  smaller = [
    np.stack(
      [np.asarray(Image.fromarray(x).reduce(SIDES[0] // s)) for x in largest]
    )
    for s in SIDES[1:]
  ]
  return largest, *smaller
