"""Array helpers of the judge: block means and blurs."""

import numpy as np
from jaxtyping import Float


def box_mean(
  image: Float[np.ndarray, 'h w ...'], k: int
) -> Float[np.ndarray, 'h2 w2 ...']:
  """Means of k×k blocks; rows and columns left over are dropped."""
  if k == 1:
    return image
  h, w = (n // k * k for n in image.shape[:2])
  blocks = image[:h, :w].reshape(h // k, k, w // k, k, *image.shape[2:])
  return blocks.mean((1, 3))


def smooth(
  image: Float[np.ndarray, 'h w ...'], passes: int
) -> Float[np.ndarray, 'h w ...']:
  """Binomial blur (1 2 1)/4 along both axes, `passes` times."""
  for _ in range(passes):
    for axis in (0, 1):
      edge = [(1, 1) if a == axis else (0, 0) for a in range(image.ndim)]
      p = np.moveaxis(np.pad(image, edge, mode='edge'), axis, 0)
      image = np.moveaxis((p[:-2] + 2 * p[1:-1] + p[2:]) / 4, 0, axis)
  return image
