"""The judge's definitions of colours and fills, as thresholds on pixels."""

import bisect
import colorsys

import numpy as np
from jaxtyping import Bool, Float

# Hues in degrees at which a colour's name ends.
LIMITS = (14, 39, 72, 180, 250, 304, 346)
HUES = ('red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'red')


def _hue_name(hue: float) -> str:
  """Names a hue in [0, 1)."""
  return HUES[bisect.bisect(LIMITS, 360 * hue)]


def colour_name(pixels: Float[np.ndarray, 'n 3']) -> str:
  """Names the colour of a thing from its pixels in [0, 1].

  The mean is named: a fill has two tones of one colour, possibly too fine to
  separate.
  """
  mean = pixels.mean(0)
  hue, saturation, value = colorsys.rgb_to_hsv(*mean)
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


def background_name(rgb: Float[np.ndarray, '3']) -> str:
  """Names a background; a faint tint counts, as most backgrounds are pale."""
  hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
  if value < 0.2:
    return 'black'
  if saturation < 0.09:
    return 'white' if value > 0.92 else 'grey'
  return _hue_name(hue)


def fill_name(
  pixels: Float[np.ndarray, 'h w 3'], core: Bool[np.ndarray, 'h w']
) -> str:
  """Names the fill of a thing from its pixels inside `core`.

  Edges between the two tones have one direction in stripes, two perpendicular
  ones in checks and all directions around dots. Dots cover less than half of
  the area, while checks have equal parts of both tones.
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
  # Gradient power concentrated in one direction, and in two perpendicular ones.
  one, crosswise = (
    np.abs((power * (edge / np.abs(edge)) ** n).sum()) / power.sum()
    for n in (2, 4)
  )
  if one > 0.45:
    return 'striped'
  skew = np.abs((seen**3).mean()) / (seen**2).mean() ** 1.5
  return 'dotted' if skew > crosswise else 'checkered'
