"""Detects the shapes in an image by classical vision.

The judge's colours, fills and shapes (`naming`, `silhouettes`) are defined from
the words of the captions alone. They share neither numbers nor formulas with
the renderer, so agreement between the two is evidence. The background is the
median of the border; things are the connected regions that differ from it.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8
from scipy import ndimage

from imagen_jax.worlds.naming import background_name, colour_name, fill_name
from imagen_jax.worlds.regions import box_mean, smooth
from imagen_jax.worlds.silhouettes import shape_name

WORK = 128  # things are found at less than twice this resolution
FILL_SIZE = 256  # smallest image in which a fill is read
SPECK = 0.004  # regions below this fraction of the image are ignored
SMALL = 0.36  # things below this fraction of the image's side are small


@dataclasses.dataclass(frozen=True)
class Found:
  """A detected thing; positions and extents are fractions of the image.

  `shape` and `colour` are caption words, or 'unknown'. None marks what was not
  read, such as the `fill` in an image that is too small. `match` is the overlap
  with the silhouette, in [0, 1].
  """

  shape: str
  colour: str | None
  fill: str | None
  size: str | None
  x: float
  y: float
  width: float
  height: float
  match: float


@dataclasses.dataclass(frozen=True)
class Reading:
  """Everything read from one image."""

  background: str
  things: tuple[Found, ...]


def _eroded(
  region: Bool[np.ndarray, 'h w'], least: int
) -> Bool[np.ndarray, 'h w']:
  """The region without its outermost pixels, if `least` pixels remain."""
  inner = ndimage.minimum_filter(region, 3, mode='nearest')
  return inner if inner.sum() >= least else region


def _thing(
  pixels: Float[np.ndarray, 'h w 3'],
  full: Float[np.ndarray, 'h2 w2 3'],
  ground: Float[np.ndarray, '3'],
  labels: Int32[np.ndarray, 'h w'],
  k: int,
) -> Found | None:
  """The `Found` of region k, or None if it is a speck.

  Args:
    pixels: in [0, 1], at working resolution.
    full: the same image, larger by an integer factor, for fills.
    ground: the background.
    labels, k: regions of `pixels`, and the index of this one.
  """
  region = labels == k
  h, w = region.shape
  if region.sum() < SPECK * h * w:
    return None
  ys, xs = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
  y0, y1, x0, x1 = ys[0], ys[-1] + 1, xs[0], xs[-1] + 1
  width, height = (x1 - x0) / w, (y1 - y0) / h
  # The region with a margin of two pixels, where its soft edge ends.
  near = np.s_[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2]
  part, crop = region[near], pixels[near]
  core = _eroded(part, 4)
  deep = _eroded(core, 12)
  # Soft mask: 0 at the background's colour, 1 at the thing's.
  way = crop[core].mean(0) - ground
  mask = np.clip((crop - ground) @ way / max(way @ way, 1e-3), 0, 1)
  mask = np.where(core, 1, np.where((labels[near] > 0) & ~part, 0, mask))
  shape, match = shape_name(np.where(mask < 0.15, 0, mask))
  fill = None
  if full.shape[0] >= FILL_SIZE:
    s = full.shape[0] // h
    rows, columns = (slice(a.start * s, a.stop * s) for a in near)
    inside = deep.repeat(s, 0).repeat(s, 1)
    fill = fill_name(smooth(full[rows, columns], 2), inside)
  return Found(
    shape=shape,
    colour=colour_name(crop[deep]),
    fill=fill,
    size='small' if max(width, height) < SMALL else 'large',
    x=(x0 + x1) / 2 / w,
    y=(y0 + y1) / 2 / h,
    width=width,
    height=height,
    match=match,
  )


def read(image: UInt8[np.ndarray, 'h w 3']) -> Reading:
  """Reads an image: its background and the things on it.

  Args:
    image: 32 pixels or more a side.

  Returns:
    A `Reading`.
  """
  full = np.asarray(image, np.float32) / 255
  full = box_mean(full, max(1, full.shape[0] // FILL_SIZE))
  scale = max(1, full.shape[0] // WORK)
  pixels = box_mean(full, scale)
  h, w = pixels.shape[:2]
  full = full[: h * scale, : w * scale]
  if h >= 48:
    pixels = smooth(pixels, 1)
  ring = max(1, h // 64)
  border = np.ones((h, w), bool)
  border[ring:-ring, ring:-ring] = False
  ground = np.median(pixels[border], axis=0)
  distance = np.linalg.norm(pixels - ground, axis=-1)
  # A pixel belongs to a thing if its distance from the background is 0.36 of
  # the local maximum or more: less than half, because the dark tone of a fill
  # may be close to a black background.
  window = 2 * max(1, round(0.04 * h)) + 1
  local = ndimage.maximum_filter(distance, window, mode='nearest')
  labels, number = ndimage.label(distance > np.maximum(0.12, 0.36 * local))
  things = (
    _thing(pixels, full, ground, labels, k) for k in range(1, number + 1)
  )
  return Reading(background_name(ground), tuple(t for t in things if t))
