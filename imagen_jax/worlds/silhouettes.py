"""The judge's shape classifier: silhouettes compared by overlap.

Every shape has a few silhouettes of different proportions, defined in this
file. A thing's mask is aligned to their centroid and area and gets the name of
the silhouette with the largest soft intersection over union.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import ndimage

from imagen_jax.worlds.regions import box_mean

MATCH = 0.78  # least overlap with a silhouette; below, the shape is unknown
# Whether points (x, y) are inside, y downwards.
Test: TypeAlias = Callable[..., Bool[np.ndarray, '...']]
GRID, REACH = 32, 1.05  # samples a side; half-width in units of sqrt(area)


def _polygon(
  x: Float[np.ndarray, 'h w'],
  y: Float[np.ndarray, 'h w'],
  corners: Sequence[tuple[float, float]],
) -> Bool[np.ndarray, 'h w']:
  """Even-odd test of points against a polygon."""
  inside = np.zeros(x.shape, bool)
  for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]]):
    if ay != by:
      crosses = (ay > y) != (by > y)
      inside ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
  return inside


def _lobes(
  x: Float[np.ndarray, 'h w'],
  y: Float[np.ndarray, 'h w'],
  bulge: float,
  spread: float,
  tip: float,
) -> Bool[np.ndarray, 'h w']:
  """Two discs side by side that both shrink to one point below."""
  inside = np.zeros(x.shape, bool)
  for s in np.linspace(0, 1, 24):
    radius, middle = 0.5 * (1 - s**bulge), spread * (1 - s)
    inside |= np.hypot(abs(x) - middle, y - s * tip) <= radius
  return inside


def _silhouettes() -> Iterator[tuple[str, Test]]:
  """(name, predicate on points) of every silhouette."""
  yield 'circle', lambda x, y: np.hypot(x, y) < 0.8
  for a in (0.85, 1, 1.18):
    yield 'square', lambda x, y, a=a: np.maximum(abs(x) * a, abs(y)) < 0.7
  for height in (1.3, 1.5, 1.7):
    corners = [(0, -height / 2), (0.85, height / 2), (-0.85, height / 2)]
    yield 'triangle', functools.partial(_polygon, corners=corners)
  for notch in (0.38, 0.46, 0.55):
    turns = np.pi * np.arange(10) / 5
    radii = np.where(np.arange(10) % 2, notch, 1) * 0.95
    corners = list(zip(radii * np.sin(turns), -radii * np.cos(turns)))
    yield 'star', functools.partial(_polygon, corners=corners)
  for bulge, spread, tip in ((1, 0.35, 1.1), (2, 0.35, 1), (2, 0.45, 1.1)):
    yield (
      'heart',
      functools.partial(_lobes, bulge=bulge, spread=spread, tip=tip),
    )
  for bite, shift in ((0.75, 0.45), (0.7, 0.55), (0.8, 0.6)):
    for turn in np.radians((0, 30, -30, 180)):
      u, v = shift * np.cos(turn), shift * np.sin(turn)
      yield (
        'moon',
        lambda x, y, b=bite, u=u, v=v: (
          (np.hypot(x, y) < 0.85) & (np.hypot(x - u, y - v) > b)
        ),
      )
  for arm in (0.2, 0.27, 0.34):
    yield (
      'cross',
      lambda x, y, a=arm: (
        (np.minimum(abs(x), abs(y)) < a) & (np.maximum(abs(x), abs(y)) < 0.8)
      ),
    )
  for width in (0.55, 0.72, 0.95):
    yield 'diamond', lambda x, y, w=width: abs(x) / w + abs(y) < 0.95


def _normalised(
  weight: Float[np.ndarray, 'h w'],
  x: Shaped[np.ndarray, 'h w'],
  y: Shaped[np.ndarray, 'h w'],
) -> tuple[float, float, float]:
  """Centroid and sqrt(area) of weights at points (x, y)."""
  total = weight.sum()
  cx, cy = (weight * x).sum() / total, (weight * y).sum() / total
  return cx, cy, np.sqrt(total)


def _steps(number: int) -> Float[np.ndarray, ' n']:
  """Centres of equal parts of [-1, 1]."""
  return (np.arange(number) + 0.5) / number * 2 - 1


@functools.cache
def _templates() -> tuple[list[str], Float[np.ndarray, 'n points']]:
  """Names, and silhouettes [n, GRID²], centred and scaled to equal area."""
  fine = np.linspace(-1, 1, 201)
  x, y = np.meshgrid(fine, fine)
  steps = _steps(GRID * 3)
  names, masks = [], []
  for name, test in _silhouettes():
    cx, cy, side = _normalised(test(x, y).astype(float), x, y)
    side *= fine[1] - fine[0]
    sx, sy = np.meshgrid(cx + REACH * side * steps, cy + REACH * side * steps)
    names.append(name)
    masks.append(box_mean(test(sx, sy).astype(np.float32), 3).ravel())
  return names, np.array(masks)


def shape_name(mask: Float[np.ndarray, 'h w']) -> tuple[str, float]:
  """Name and overlap of the silhouette nearest to a soft mask."""
  y, x = np.indices(mask.shape, float)
  cx, cy, side = _normalised(mask, x, y)
  steps = _steps(GRID) * REACH * side
  sx, sy = np.meshgrid(cx + steps, cy + steps)
  seen = ndimage.map_coordinates(mask, [sy, sx], order=1, mode='grid-constant')
  # Edges of a small image are a pixel wide: sharpen them about the outline,
  # where the mask is 1/2.
  seen = np.clip(3 * seen.ravel() - 1, 0, 1)
  names, masks = _templates()
  overlap = np.minimum(masks, seen).sum(1) / np.maximum(masks, seen).sum(1)
  best = int(overlap.argmax())
  name = names[best] if overlap[best] >= MATCH else 'unknown'
  return name, float(overlap[best])
