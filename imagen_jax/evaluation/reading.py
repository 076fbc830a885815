"""Reads a picture of shapes back by classical vision: what is where.

Written against the words of the captions alone: the colours, shapes and
patterns here are this file's own idea of "red", "star" or "striped", and share
neither numbers nor formulas with the renderer, so agreement between the two is
evidence. Steps: the background is the median of the border; things are the
connected regions that differ from it; a thing's colour is named by hue,
saturation and value; its shape is the nearest of a few silhouettes under soft
intersection over union; its fill is told from the directions of the edges
inside it.
"""

import dataclasses
import functools

import numpy as np

WORK = 128  # pictures larger than this are averaged down to find things
FILL_SIZE = 256  # smallest picture in which a fill is told
SPECK = 0.004  # regions below this fraction of the picture are ignored
MATCH = 0.78  # least overlap with a silhouette that names a shape
SMALL = 0.36  # things below this fraction of the picture's side are small
GRID, REACH = 32, 1.05  # samples, and their reach in units of sqrt(area)


@dataclasses.dataclass(frozen=True)
class Found:
  """A thing found; places and extents are fractions of the picture.

  `shape` and `colour` are caption words, or 'unknown'; `fill` is None where
  the picture is too small to tell; `match` is the overlap with the silhouette.
  """

  shape: str
  colour: str
  fill: str | None
  size: str
  x: float
  y: float
  width: float
  height: float
  match: float


@dataclasses.dataclass(frozen=True)
class Reading:
  """Everything read from one picture."""

  background: str
  things: tuple[Found, ...]


def _box_mean(image, k):
  h, w = (n // k * k for n in image.shape[:2])
  blocks = image[:h, :w].reshape(h // k, k, w // k, k, *image.shape[2:])
  return blocks.mean((1, 3))


def _smooth(image, passes):
  """Binomial blur (1 2 1)/4 along both axes, `passes` times."""
  for _ in range(passes):
    for axis in (0, 1):
      edge = [(1, 1) if a == axis else (0, 0) for a in range(image.ndim)]
      p = np.moveaxis(np.pad(image, edge, mode='edge'), axis, 0)
      image = np.moveaxis((p[:-2] + 2 * p[1:-1] + p[2:]) / 4, 0, axis)
  return image


def _extreme(values, radius, pick):
  """Running maximum or minimum over a square window of a 2-d array."""
  for axis in (0, 1):
    edge = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
    p = np.pad(values, edge, mode='edge')
    views = np.lib.stride_tricks.sliding_window_view(p, 2 * radius + 1, axis)
    values = pick(views, axis=-1)
  return values


def label(mask):
  """Connected regions (4-neighbours) of a boolean [H, W].

  Runs of each row are joined to the runs they touch in the row above.

  Returns:
    int32 [H, W] with 0 outside and 1..n inside, and n.
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


def _hue_name(hue):
  for limit, name in (
    (14, 'red'),
    (39, 'orange'),
    (72, 'yellow'),
    (180, 'green'),
    (250, 'blue'),
    (304, 'purple'),
    (346, 'pink'),
  ):
    if hue < limit:
      return name
  return 'red'


def _hsv(rgb):
  """(hue in degrees, saturation, value) of one colour in [0, 1]³."""
  r, g, b = rgb
  high, low = max(r, g, b), min(r, g, b)
  chroma = high - low
  if chroma < 1e-6:
    return 0.0, 0.0, high
  if high == r:
    hue = ((g - b) / chroma) % 6
  elif high == g:
    hue = (b - r) / chroma + 2
  else:
    hue = (r - g) / chroma + 4
  return 60 * hue, chroma / high, high


def colour_name(pixels):
  """Names the colour of a thing from its pixels [N, 3] in [0, 1].

  A thing may have two tones of one colour, in stripes too fine to separate,
  so it is the mean that is named.
  """
  mean = pixels.mean(0)
  hue, saturation, value = _hsv(mean)
  if saturation < 0.22 or mean.max() - mean.min() < 0.08:
    if value < 0.325:
      return 'black'
    return 'white' if value > 0.7 else 'grey'
  name = _hue_name(hue)
  if name == 'red' and saturation < 0.5 and value > 0.6:
    return 'pink'
  if name == 'orange' and value < 0.5:
    return 'unknown'  # brown
  return name


def background_name(rgb):
  """Names a background; a faint tint counts, as pale colours are usual."""
  hue, saturation, value = _hsv(rgb)
  if value < 0.2:
    return 'black'
  if saturation < 0.09:
    return 'white' if value > 0.92 else 'grey'
  return _hue_name(hue)


def _polygon(x, y, corners):
  """Even-odd test of points against a polygon."""
  inside = np.zeros(x.shape, bool)
  for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
    if ay == by:
      continue
    crosses = (ay > y) != (by > y)
    inside ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
  return inside


def _lobes(x, y, spread, tip, bulge):
  """Two discs side by side that both shrink to one point below."""
  inside = np.zeros(x.shape, bool)
  for s in np.linspace(0, 1, 24):
    radius, middle = 0.5 * (1 - s**bulge), spread * (1 - s)
    inside |= np.hypot(abs(x) - middle, y - s * tip) <= radius
  return inside


def _silhouettes():
  """(name, test of points) of every silhouette, y downwards, of any scale."""
  yield 'circle', lambda x, y: np.hypot(x, y) < 0.8
  for aspect in (0.85, 1, 1.18):
    yield (
      'square',
      lambda x, y, a=aspect: np.maximum(abs(x) * a, abs(y)) < 0.7,
    )
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
      functools.partial(_lobes, spread=spread, tip=tip, bulge=bulge),
    )
  for bite, shift in ((0.75, 0.45), (0.7, 0.55), (0.8, 0.6)):
    for turn in np.radians((0, 30, -30, 180)):
      yield (
        'moon',
        lambda x, y, b=bite, s=shift, t=turn: (
          (np.hypot(x, y) < 0.85)
          & (np.hypot(x - s * np.cos(t), y - s * np.sin(t)) > b)
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


def _normalised(weight, x, y):
  """Centroid and sqrt(area) of weights at places: where and how large."""
  total = weight.sum()
  cx, cy = (weight * x).sum() / total, (weight * y).sum() / total
  return cx, cy, np.sqrt(total)


@functools.cache
def _templates():
  """Names, and silhouettes [n, GRID²] about their centroids at equal area."""
  fine = np.linspace(-1, 1, 201)
  x, y = np.meshgrid(fine, fine)
  steps = (np.arange(GRID * 3) + 0.5) / (GRID * 3) * 2 - 1
  names, masks = [], []
  for name, test in _silhouettes():
    cx, cy, side = _normalised(test(x, y).astype(float), x, y)
    side *= fine[1] - fine[0]
    sx, sy = np.meshgrid(cx + REACH * side * steps, cy + REACH * side * steps)
    names.append(name)
    masks.append(_box_mean(test(sx, sy).astype(np.float32), 3).ravel())
  return names, np.array(masks)


def _sample(values, x, y):
  """Bilinear samples of a 2-d array at pixel places; 0 outside."""
  values = np.pad(values, 1)
  x = np.clip(x + 1, 0, values.shape[1] - 1.001)
  y = np.clip(y + 1, 0, values.shape[0] - 1.001)
  i, j = y.astype(int), x.astype(int)
  u, v = x - j, y - i
  return (1 - v) * ((1 - u) * values[i, j] + u * values[i, j + 1]) + v * (
    (1 - u) * values[i + 1, j] + u * values[i + 1, j + 1]
  )


def shape_name(mask):
  """(shape, overlap) of the silhouette nearest to a soft mask [H, W]."""
  y, x = np.indices(mask.shape)
  cx, cy, side = _normalised(mask, x, y)
  steps = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH * side
  sx, sy = np.meshgrid(cx + steps, cy + steps)
  # The edges of a small picture are a pixel wide: sharpen them about their
  # middle, where the outline is.
  seen = np.clip(3 * _sample(mask, sx, sy).ravel() - 1, 0, 1)
  names, masks = _templates()
  overlap = np.minimum(masks, seen).sum(1) / np.maximum(masks, seen).sum(1)
  best = int(overlap.argmax())
  return (names[best] if overlap[best] >= MATCH else 'unknown'), overlap[best]


def fill_name(pixels, core):
  """Names the fill of a thing from its pixels [H, W, 3], inside `core`.

  The edges between two tones run one way in stripes, two ways crosswise in
  checks, and every way around dots; and dots are the rarer tone of their
  thing, while checks share it evenly.
  """
  if core.sum() < 64:
    return 'plain'
  inside = pixels[core] - pixels[core].mean(0)
  axis = np.linalg.svd(inside.T @ inside)[0][:, 0]
  seen = inside @ axis
  low, high = np.percentile(seen, (15, 85))
  if high - low < 0.13:
    return 'plain'
  dy, dx = np.gradient(pixels @ axis)
  edge = (dx + 1j * dy)[core]
  edge = edge[np.abs(edge) > 0.3 * np.abs(edge).max()]
  power = np.abs(edge) ** 2
  # Share of the power in edges along one direction, and along two crosswise.
  one, crosswise = (
    np.abs((power * (edge / np.abs(edge)) ** n).sum()) / power.sum()
    for n in (2, 4)
  )
  if one > 0.45:
    return 'striped'
  skew = np.abs((seen**3).mean()) / (seen**2).mean() ** 1.5
  return 'dotted' if skew > crosswise else 'checkered'


def read(image):
  """Reads a picture: its background and the things on it.

  Args:
    image: uint8 [H, W, 3], 32 pixels or more a side (see judge_accuracy for
      how well it is read at each size).

  Returns:
    A `Reading`.
  """
  pixels = np.asarray(image, np.float32) / 255
  if pixels.shape[0] >= 2 * FILL_SIZE:
    pixels = _box_mean(pixels, pixels.shape[0] // FILL_SIZE)
  full = pixels
  scale = max(1, pixels.shape[0] // WORK)
  if scale > 1:
    pixels = _box_mean(pixels, scale)
  h, w = pixels.shape[:2]
  if h >= 48:
    pixels = _smooth(pixels, 1)
  ring = max(1, h // 64)
  border = np.ones((h, w), bool)
  border[ring:-ring, ring:-ring] = False
  ground = np.median(pixels[border], axis=0)
  distance = np.linalg.norm(pixels - ground, axis=-1)
  # A pixel belongs to a thing when nearer to it than to the background; the
  # dark tone of a fill may be near a black background, hence not one half.
  local = _extreme(distance, max(1, round(0.04 * h)), np.max)
  labels, number = label(distance > np.maximum(0.12, 0.36 * local))
  things = []
  for k in range(1, number + 1):
    region = labels == k
    if region.sum() < SPECK * h * w:
      continue
    ys, xs = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    y0, y1 = max(ys[0] - 2, 0), min(ys[-1] + 3, h)
    x0, x1 = max(xs[0] - 2, 0), min(xs[-1] + 3, w)
    part = region[y0:y1, x0:x1]
    others = (labels[y0:y1, x0:x1] > 0) & ~part
    core = _extreme(part, 1, np.min)
    if core.sum() < 4:
      core = part
    # How far each pixel has gone from the background to the thing's colour.
    way = pixels[y0:y1, x0:x1][core].mean(0) - ground
    soft = (pixels[y0:y1, x0:x1] - ground) @ way / (way @ way)
    soft = np.clip(soft, 0, 1)
    soft = np.where(core, 1, np.where(others, 0, soft))
    soft = np.where(soft < 0.15, 0, soft)
    shape, match = shape_name(soft)
    deep = _extreme(core, 1, np.min)
    inner = deep if deep.sum() >= 12 else core
    fill = None
    if full.shape[0] >= FILL_SIZE:
      s = scale
      crop = full[y0 * s : y1 * s, x0 * s : x1 * s]
      fill = fill_name(
        _smooth(crop, 2), inner.repeat(s, 0).repeat(s, 1)[: crop.shape[0]]
      )
    width, height = (xs[-1] - xs[0] + 1) / w, (ys[-1] - ys[0] + 1) / h
    things.append(
      Found(
        shape=shape,
        colour=colour_name(pixels[y0:y1, x0:x1][inner]),
        fill=fill,
        size='small' if max(width, height) < SMALL else 'large',
        x=(xs[0] + xs[-1] + 1) / 2 / w,
        y=(ys[0] + ys[-1] + 1) / 2 / h,
        width=width,
        height=height,
        match=float(match),
      )
    )
  return Reading(background_name(ground), tuple(things))
