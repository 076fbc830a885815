"""Renders the scenes of the shapes world: geometry, palette, antialiasing.

A shape is a predicate on points (u, v) of the square [-1, 1]², u to the right
and v downwards; it touches the square's left and right or top and bottom sides.
A fill is a predicate on offsets from the thing's centre, in pattern periods.
Each pixel is the mean of such predicates over a grid of subpixels, so an image
rendered at 64 is nearly the 4×4 box mean of the same image rendered at 256.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, UInt8

Grid: TypeAlias = Float[np.ndarray, '...']
Inside: TypeAlias = Bool[np.ndarray, '...']
Predicate: TypeAlias = Callable[[Grid, Grid], Inside]

PALETTE = {
  'red': (222, 40, 45),
  'orange': (247, 134, 24),
  'yellow': (252, 212, 40),
  'green': (38, 160, 72),
  'blue': (40, 92, 218),
  'purple': (132, 58, 182),
  'pink': (250, 138, 190),
  'white': (252, 252, 252),
  'black': (26, 26, 30),
  'grey': (134, 137, 142),
}
BACKGROUND = {
  'white': (255, 255, 255),
  'black': (10, 10, 14),
  'grey': (204, 206, 210),
  'blue': (188, 219, 246),
  'green': (200, 233, 198),
  'yellow': (253, 242, 200),
}
PERIOD = 0.08  # of a fill's pattern, as a fraction of the image


def second_tone(colour: str) -> tuple[int, ...]:
  """The other tone of a two-tone fill, (r, g, b) in 0..255.

  A darker shade of the same colour, so that its name still fits (a lighter red
  would be pink). Black has no darker shade and gets a grey.
  """
  if colour == 'black':
    return (104, 104, 110)
  keep = 0.62 if colour == 'white' else 0.5
  return tuple(round(keep * c) for c in PALETTE[colour])


def contrast(colour: str, background: str, fill: str | None = None) -> float:
  """Least RGB distance between a background and mixes of a thing's tones."""
  ground = np.array(BACKGROUND[background], float)
  base = np.array(PALETTE[colour]) - ground
  along = np.zeros(3)
  if fill in SECOND:
    along = np.array(second_tone(colour)) - ground - base
  mixes = base + np.linspace(0, 1, 11)[:, None] * along
  return float(np.linalg.norm(mixes, axis=1).min())


def _triangle(u: Grid, v: Grid) -> Inside:
  # Equilateral, of side 2: the top at v = -h/2, the base at v = h/2.
  h = 3**0.5
  return (v <= h / 2) & (np.abs(u) * h <= v + h / 2)


def _star(u: Grid, v: Grid) -> Inside:
  # Two reflections fold the arms onto the upper one, whose edge is a line.
  tip = 1 / np.sin(np.radians(72))  # radius at which the arms touch u = ±1
  v = v - (tip - tip * np.cos(np.radians(36))) / 2  # centres the star's box
  u = np.abs(u)
  for mirror in np.radians((108, 36)):  # angles from the top
    c, s = np.float32(np.cos(mirror)), np.float32(np.sin(mirror))
    d = 2 * np.maximum(c * u + s * v, 0)
    u, v = u - d * c, v - d * s
  x, y = 0.5 * tip * s, tip - 0.5 * tip * c  # from the tip to the notch
  return np.abs(u) * y <= (v + tip) * x


def _heart(u: Grid, v: Grid) -> Inside:
  # The sextic (x² + y² - 1)³ = x² y³, 2.28 wide and 2.24 high.
  x, y = 1.14 * u, 0.12 - 1.14 * v
  xx, yy = x * x, y * y
  k = xx + yy - 1
  return k * k * k <= xx * yy * y


def _moon(u: Grid, v: Grid) -> Inside:
  # A disc less a disc; the tips are at u = 0.527 before centring.
  u = u - 0.236
  w = u - 0.55
  return (u * u + v * v <= 1) & (w * w + v * v >= 0.85**2)


def _cross(u: Grid, v: Grid) -> Inside:
  u, v = np.abs(u), np.abs(v)
  return (np.minimum(u, v) <= 0.34) & (np.maximum(u, v) <= 1)


INSIDE: dict[str, Predicate] = {
  'circle': lambda u, v: u * u + v * v <= 1,
  'square': lambda u, v: (np.abs(u) <= 1) & (np.abs(v) <= 1),
  'triangle': _triangle,
  'star': _star,
  'heart': _heart,
  'moon': _moon,
  'cross': _cross,
  'diamond': lambda u, v: np.abs(u) / 0.72 + np.abs(v) <= 1,
}


def _dotted(x: Grid, y: Grid) -> Inside:
  x, y = np.mod(x, 1) - 0.5, np.mod(y, 1) - 0.5
  return x * x + y * y < 0.3**2


SECOND: dict[str, Predicate] = {
  'striped': lambda x, y: np.mod(x + y, 1.41) < 0.705,
  'dotted': _dotted,
  'checkered': lambda x, y: (np.mod(x, 1.4) < 0.7) ^ (np.mod(y, 1.4) < 0.7),
}


@functools.cache
def _tones(colour: str) -> Float[np.ndarray, '2 3']:
  return np.array([PALETTE[colour], second_tone(colour)], np.float32)


def _box_mean(
  inside: Bool[np.ndarray, 'rows columns'], k: int
) -> Float[np.ndarray, 'h w']:
  """Means over k×k blocks, float32."""
  h, w = inside.shape
  rows = inside.view(np.uint8).reshape(h // k, k, w).sum(1, dtype=np.uint16)
  return rows.reshape(h // k, w // k, k).sum(2, dtype=np.uint16) / np.float32(
    k * k
  )


def render(scene: Any, size: int) -> UInt8[np.ndarray, 's s 3']:
  """Renders a scene, antialiased, at any resolution.

  Args:
    scene: has `.background` and `.things`, each with shape, colour, fill, x, y
      and diameter as fractions of the image, y downwards.
    size: the image's side in pixels.
  """
  image = np.empty((size, size, 3), np.float32)
  image[:] = BACKGROUND[scene.background]
  k = max(4, 256 // size)  # subpixels along a side
  for thing in scene.things:
    radius = thing.diameter / 2
    spans, offsets = [], []
    for c in (thing.x, thing.y):
      start = max(int((c - radius) * size), 0)
      end = min(int((c + radius) * size) + 1, size)
      # Subpixel centres as distances from the thing's centre.
      at = (np.arange(start * k, end * k, dtype=np.float32) + 0.5) / (size * k)
      spans.append(slice(start, end))
      offsets.append(at - np.float32(c))
    xs, ys = offsets[0], offsets[1][:, None]
    inside = INSIDE[thing.shape](xs / radius, ys / radius)
    base, shade = _tones(thing.colour)
    alpha = _box_mean(inside, k)[..., None]
    part = image[spans[1], spans[0]]
    part += alpha * (base - part)
    if thing.fill in SECOND:
      second = SECOND[thing.fill](xs / PERIOD, ys / PERIOD) & inside
      part += _box_mean(second, k)[..., None] * (shade - base)
  return np.rint(image).astype(np.uint8)
