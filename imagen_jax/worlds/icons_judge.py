"""The judge of the icons world: a linear probe on a network's features.

What is in front of the background is cropped and enlarged, so that size and
place do not matter, and ridge regression on the features of renders says which
thing it is in which style. Two things are told apart by the widest gap between
them, and things are counted as connected parts. How often the judge itself errs
is measured on other renders.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy import ndimage

from imagen_jax.worlds.icon_scenes import Group, Scene, World, scene
from imagen_jax.worlds.icons import IconsSource

SIZE = 224  # of the crops
MARGIN = 0.06  # around what is cropped, as a fraction of its side
DIFFERENT = 20  # of 255, in one channel: no background
RIDGE = 0.03  # of the mean variance of a feature, times the examples
SEED = 1128  # of the renders that the probe is fitted to
LOOKS = 6  # renders of each thing in each style
# Parts of a thing are nearer than twice this fraction of the image, and parts
# that have less than a fraction of the largest one's pixels do not count.
REACH, LEAST = 0.02, 0.2

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

  def __call__(self, x: Features) -> Float[np.ndarray, 'n k']:
    return x @ self.weights + self.bias


@dataclasses.dataclass(frozen=True)
class Judge:
  """What is in an image.

  Attributes:
    features: images of `SIZE` pixels -> [N, D].
    probe: of the pairs (thing, style), the styles of a thing side by side.
    styles: their number.
  """

  features: Callable[[Iterable[Pixels]], Features]
  probe: Probe
  styles: int

  def icons(
    self, images: Iterable[Pixels]
  ) -> Float[np.ndarray, 'n things styles']:
    """How likely each icon is all that an image shows; the largest is."""
    x = self.features(crop(image, foreground(image)) for image in images)
    return self.probe(x).reshape(len(x), -1, self.styles)

  def parts(self, images: Iterable[Pixels]) -> Int[np.ndarray, 'n 2']:
    """The thing in each of two parts: of the left or upper part first."""
    crops = (part for image in images for part in _parts(image))
    best = self.probe(self.features(crops)).argmax(1)
    return best.reshape(-1, 2) // self.styles


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
  styles = len(source.world.styles)
  labels = [scene.things[0] * styles + scene.style for scene in shown]
  classes = len(source.world.things) * styles
  return Judge(features, Probe.fit(x, labels, classes), styles)


def training_scenes(world: World) -> Iterator[Scene]:
  """`LOOKS` scenes of every thing in every style, half of them half as large.

  Things are that small in pairs. Of a thing with more images than that allows
  for, there are two scenes of each.
  """
  other = dataclasses.replace(world, seed=SEED, split='eval')
  styles, things = range(len(world.styles)), range(len(world.things))
  numbers = [[world.number_of_looks(s, t) for s in styles] for t in things]
  most = max(LOOKS, 2 * max(map(max, numbers)))
  every = itertools.product(range(most), things, styles)
  for i, (look, thing, style) in enumerate(every):
    number = numbers[thing][style]
    if not number or look >= max(LOOKS, 2 * number):
      continue
    found = scene(other, i, 'single')
    (x, y, diameter) = found.places[0]
    yield dataclasses.replace(
      found,
      groups=(Group(thing),),
      style=style,
      places=((x, y, diameter / (1 + look % 2)),),
      looks=(look // 2 % number,),
    )


def count(image: Pixels) -> int:
  """The number of things in front of the background."""
  mask = foreground(image)
  side = 2 * max(1, round(REACH * len(mask))) + 1
  joined = ndimage.binary_dilation(mask, np.ones((side, side)))
  labels, number = ndimage.label(joined, np.ones((3, 3)))
  sizes = ndimage.sum_labels(mask, labels, range(1, number + 1))
  return int((sizes > LEAST * sizes.max(initial=0)).sum())


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
