"""The images that a call of sampling is given: checks, and their pixels."""

from typing import Any

import numpy as np
import PIL.Image

from imagen_jax.errors import UsageError
from imagen_jax.io import images as image_io


def check_images(
  stage: str,
  upsamples: bool,
  *,
  low_res: Any = None,
  image: PIL.Image.Image | None = None,
  mask: PIL.Image.Image | None = None,
  strength: Any = None,
) -> None:
  """Rejects images that the first stage cannot start from.

  Args:
    stage: its name.
    upsamples: whether it needs `low_res`.
    low_res: the image or images to upsample.
    image: the image to start from.
    mask: where to inpaint it.
    strength: the caller's choice; it needs `image`.

  Raises:
    UsageError: one is missing, has no effect or has another shape.
  """
  if upsamples and low_res is None:
    raise UsageError(
      f'stage {stage} upsamples images: give it one, or start with a stage '
      'that generates from text alone.',
      key='low_res',
    )
  if low_res is not None and not upsamples:
    raise UsageError(
      f'stage {stage} generates from text alone and takes no low-resolution '
      'image; choose a later stage.',
      key='low_res',
    )
  if strength is not None and image is None:
    raise UsageError(
      'strength has no effect without an image to start from.', key='strength'
    )
  if mask is not None:
    if image is None:
      raise UsageError('mask needs an image to inpaint.', key='mask')
    if mask.size != image.size:
      raise UsageError(
        f'mask has {mask.width}×{mask.height} pixels and the image '
        f'{image.width}×{image.height}; they must have the same size.',
        key='mask',
      )
    if np.max(np.asarray(mask)) < 128:
      raise UsageError(
        'mask has no white pixel, so that nothing would be inpainted.',
        key='mask',
      )


def upright(
  image: PIL.Image.Image | None, mask: PIL.Image.Image | None
) -> tuple[PIL.Image.Image | None, PIL.Image.Image | None]:
  """The image and its mask in RGB and grey, decoded as for training."""
  return (
    image and image_io.upright(image),
    mask and image_io.upright(mask, 'L'),
  )


def check_size(stage: str, width: int, height: int, multiple: int) -> None:
  """Rejects a shape that a stage's network cannot generate.

  Raises:
    UsageError: a side is 0 or not a multiple of `multiple`.
  """
  if min(width, height) < 1 or width % multiple or height % multiple:
    raise UsageError(
      f'stage {stage} cannot generate {width}×{height} pixels: it takes '
      f'multiples of {multiple}; crop the image or change its aspect ratio.'
    )


def start_from(
  image: PIL.Image.Image | None,
  mask: PIL.Image.Image | None,
  width: int,
  height: int,
  *,
  resize: str = 'area',
) -> dict[str, np.ndarray]:
  """The image to start from and its mask, `upright`, at a stage's size.

  Args:
    image, mask: None without.
    width, height: the stage's size.
    resize: as in training; a mask is always averaged.

  Returns:
    {'image': [H, W, 3] in [−1, 1], 'inpaint_mask': [H, W, 1] of 0 and 1},
    without those that are None.
  """
  start = {}
  if image is not None:
    start['image'] = image_io.to_float(image, width, height, resize)
  if mask is not None:
    start['inpaint_mask'] = image_io.to_mask(mask, width, height)
  return start
