"""Array helpers of the judge: means, blurs, connected regions."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int32, Shaped


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


def extreme(
  values: Shaped[np.ndarray, 'h w'], radius: int, pick: Callable
) -> Shaped[np.ndarray, 'h w']:
  """Running maximum or minimum (`pick`) over a square window."""
  for axis in (0, 1):
    edge = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
    p = np.pad(values, edge, mode='edge')
    views = np.lib.stride_tricks.sliding_window_view(p, 2 * radius + 1, axis)
    values = pick(views, axis=-1)
  return values


def label(
  mask: Bool[np.ndarray, 'h w'],
) -> tuple[Int32[np.ndarray, 'h w'], int]:
  """Connected regions (4-neighbours) of a mask.

  Runs of each row are joined to the runs they touch in the row above.

  Returns:
    labels (0 outside, 1..n inside) and n.
  """
  h, w = mask.shape
  edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
  rows, starts = np.nonzero(edges == 1)
  ends = np.nonzero(edges == -1)[1]
  parent = list(range(len(rows)))

  def root(i):
    while parent[i] != i:
      parent[i] = parent[parent[i]]
      i = parent[i]
    return i

  first = np.searchsorted(rows, np.arange(h + 1))
  for y in range(1, h):
    above, here = first[y - 1], first[y]
    while above < first[y] and here < first[y + 1]:
      if starts[above] < ends[here] and starts[here] < ends[above]:
        a, b = root(above), root(here)
        parent[max(a, b)] = min(a, b)
      if ends[above] < ends[here]:
        above += 1
      else:
        here += 1
  roots = np.array([root(i) for i in range(len(rows))], np.int32)
  kinds, names = np.unique(roots, return_inverse=True)
  change = np.zeros((h, w + 1), np.int32)
  np.add.at(change, (rows, starts), names + 1)
  np.add.at(change, (rows, ends), -(names + 1))
  return np.cumsum(change, 1, dtype=np.int32)[:, :w], len(kinds)
