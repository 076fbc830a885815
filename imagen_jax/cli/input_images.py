"""The images that sampling starts from, read from files."""

from typing import TYPE_CHECKING

from imagen_jax.cli import output

if TYPE_CHECKING:
  import PIL.Image

  from imagen_jax.cascade.cascade import Cascade
  from imagen_jax.typing import Uint8Image


def read_low_res(cascade: 'Cascade', path: str | None) -> 'Uint8Image | None':
  """The image at a path for the first stage: uint8 [1, h, w, 3], or None.

  It is cropped so that every stage can upsample it.
  """
  side = cascade.stages[0].low_resolution
  if path is None or side is None:
    return None
  from imagen_jax.io import images as image_io

  pixels = image_io.read_low_res(path, side, cascade.multiple)
  height, width, _ = pixels.shape
  note_crop(path, image_io.open_image(path).size, width, height)
  return pixels[None]


def open_images(**paths: str | None) -> dict[str, 'PIL.Image.Image']:
  """{name: PIL image} of the paths that are given; 'mask' is grey."""
  from imagen_jax.io.images import open_image

  return {
    name: open_image(path, 'L' if name == 'mask' else 'RGB')
    for name, path in paths.items()
    if path
  }


def note_crop(
  path: str | None, size: tuple[int, int], width: int, height: int
) -> None:
  """Notes that an image does not have the aspect ratio of what is generated.

  Args:
    path: of the image.
    size: its (width, height) in pixels.
    width, height: of what is generated from it.
  """
  from imagen_jax.io import decode

  left, top, right, bottom = decode.central(size, width, height)
  if (right - left, bottom - top) != size:
    output.note(
      f'{path} has {size[0]}×{size[1]} pixels; the {right - left}×'
      f'{bottom - top} in its centre are used, which fit {width}×{height}.'
    )
