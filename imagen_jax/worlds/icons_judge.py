"""The judge of the icons world: linear probes on a network's features.

What is in front of the background is cropped and enlarged, so that size and
place do not matter, and ridge regression on the features of renders says which
thing, which style and how many. Two things are told apart by the widest gap
between them. How often the judge itself errs is measured on other renders.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from imagen_jax.worlds.icon_scenes import Scene, World, scene
from imagen_jax.worlds.icons import IconsSource

SIZE = 224  # of the crops
MARGIN = 0.06  # around what is cropped, as a fraction of its side
DIFFERENT = 20  # of 255, in one channel: no background
RIDGE = 1e-3  # of the mean variance of a feature, times the examples
SEED = 1128  # of the renders that the probes are fitted to
LOOKS, CROWDS = 4, 2  # renders of each thing and style alone, and of several

Pixels = UInt8[np.ndarray, 'h w 3']
Features = Float[np.ndarray, 'n d']
Labels = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Probe:
  """A linear classifier: the largest of x · weights + bias."""

  weights: Float[np.ndarray, 'd k']
  bias: Float[np.ndarray, ' k']

  @classmethod
  def fit(cls, x: Features, labels: Labels, classes: int) -> 'Probe':
    """Ridge regression of one-hot labels, in closed form."""
    x, y = np.asarray(x, np.float64), np.eye(classes)[np.asarray(labels)]
    mean, middle = x.mean(0), y.mean(0)
    centred = x - mean
    square = centred.T @ centred
    square += RIDGE * np.trace(square) / len(square) * np.eye(len(square))
    weights = np.linalg.solve(square, centred.T @ (y - middle))
    return cls(weights, middle - mean @ weights)

  def best(self, x: Features, number: int = 1) -> np.ndarray:
    """The `number` likeliest classes of each row, the likeliest first."""
    return np.argsort(-(x @ self.weights + self.bias), axis=1)[:, :number]


@dataclasses.dataclass(frozen=True)
class Judge:
  """What is in an image.

  Attributes:
    features: images of `SIZE` pixels -> [N, D].
    thing, style, count: probes; `count` gives the number less one.
  """

  features: Callable[[Iterable[Pixels]], Features]
  thing: Probe
  style: Probe
  count: Probe

  def whole(self, images: Iterable[Pixels]) -> Features:
    """Features of all that is in front of the background."""
    return self.features(crop(image, foreground(image)) for image in images)

  def parts(self, images: Iterable[Pixels]) -> np.ndarray:
    """The thing in each of two parts, [N, 2]: left or upper part first."""
    crops = (part for image in images for part in _parts(image))
    return self.thing.best(self.features(crops))[:, 0].reshape(-1, 2)


def fit(
  source: IconsSource, features: Callable[[Iterable[Pixels]], Features]
) -> Judge:
  """A judge for images of the source's size, fitted to its renders.

  Args:
    source: of the things and styles.
    features: images of `SIZE` pixels -> [N, D].
  """
  shown = list(training_scenes(source.world))
  x = features(
    crop(image, foreground(image)) for image in map(source.render, shown)
  )
  world = source.world
  things = [s.things[0] for s in shown]
  return Judge(
    features,
    Probe.fit(x, things, len(world.things)),
    Probe.fit(x, [s.style for s in shown], len(world.styles)),
    Probe.fit(x, [len(s.things) - 1 for s in shown], 4),
  )


def training_scenes(world: World) -> Iterator[Scene]:
  """Scenes of every thing in every style: alone, and several of it."""
  other = dataclasses.replace(world, seed=SEED, split='eval')
  for category, number in (('single', LOOKS), ('count', CROWDS)):
    for i in range(number):
      for thing in range(len(world.things)):
        for style in range(len(world.styles)):
          place = (i * len(world.things) + thing) * len(world.styles) + style
          found = scene(other, place, category)
          groups = (dataclasses.replace(found.groups[0], thing=thing),)
          yield dataclasses.replace(found, groups=groups, style=style)


def foreground(image: Pixels) -> Bool[np.ndarray, 'h w']:
  """Where an image differs from its border's median colour."""
  x = image.astype(np.int16)
  border = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
  return np.abs(x - np.median(border, 0)).max(2) > DIFFERENT


def crop(image: Pixels, mask: Bool[np.ndarray, 'h w']) -> Pixels:
  """The square around a mask, enlarged to `SIZE`; all if the mask is empty."""
  rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
  shown = Image.fromarray(image)
  if not len(rows):
    return np.asarray(shown.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
  top, bottom = rows[0], rows[-1] + 1
  left, right = columns[0], columns[-1] + 1
  side = (1 + 2 * MARGIN) * max(bottom - top, right - left)
  x, y = (left + right - side) / 2, (top + bottom - side) / 2
  corner = tuple(image[0, 0].tolist())
  return np.asarray(
    shown.transform(
      (SIZE, SIZE),
      Image.Transform.EXTENT,
      (x, y, x + side, y + side),
      Image.Resampling.BICUBIC,
      fillcolor=corner,
    )
  )


def halves(
  mask: Bool[np.ndarray, 'h w'],
) -> tuple[Bool[np.ndarray, 'h w'], Bool[np.ndarray, 'h w'], int]:
  """(left part, right part, 1) or (upper part, lower part, 0) of a mask.

  Cut in the middle of the widest gap, of columns or of rows; in half if there
  is none.
  """
  cuts = []
  for axis in (0, 1):  # columns, rows
    filled = np.nonzero(mask.any(axis))[0]
    if len(filled) > 1:
      gaps = np.diff(filled)
      at = int(gaps.argmax())
      cuts.append((int(gaps[at]), 1 - axis, int(filled[at] + gaps[at] // 2)))
  width, axis, at = max(cuts, default=(0, 1, 0))
  if width < 2:
    axis, at = 1, mask.shape[1] // 2
  first = np.zeros_like(mask)
  first[(slice(None),) * axis + (slice(at),)] = True
  return mask & first, mask & ~first, axis


def _parts(image: Pixels) -> list[Pixels]:
  first, second, _ = halves(foreground(image))
  return [crop(image, first), crop(image, second)]
