"""The images that sampling starts from, read from files."""

import math
from typing import TYPE_CHECKING

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

  units = [
    stage.net.multiple // math.gcd(stage.net.multiple, stage.resolution // side)
    for stage in cascade.stages
  ]
  return image_io.read_low_res(path, side, math.lcm(*units))[None]


def open_images(**paths: str | None) -> dict[str, 'PIL.Image.Image']:
  """{name: PIL image} of the paths that are given; 'mask' is grey."""
  from imagen_jax.io.images import open_image

  return {
    name: open_image(path, 'L' if name == 'mask' else 'RGB')
    for name, path in paths.items()
    if path
  }
