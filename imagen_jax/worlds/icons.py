"""The icons world: captioned scenes of a thousand things.

The icons come from packages on the user's disk (see `icon_sets`), and are not
part of this one. Example i of a split is a function of (seed, split, i) and the
sets, such as "two flat foxes on a blue background" or "a 3D dog to the left of
a car". Held out of training are the pairs of things and the pairs of style and
thing that hashes choose, and the names that `icons.txt` marks.
"""

import functools
import hashlib
import json
import os
import typing
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imagen_jax.data.source import Source
from imagen_jax.errors import UsageError
from imagen_jax.worlds import icon_images, icon_things
from imagen_jax.worlds.icon_scenes import (
  BACKGROUNDS,
  CATEGORIES,
  MIXTURE,
  Scene,
  World,
  scene,
)
from imagen_jax.worlds.icon_sets import IconSet, read_sets
from imagen_jax.worlds.icon_stamps import read_stamps
from imagen_jax.worlds.world import check_mixture


class IconsSource(Source):
  """Random-access source of {'image', 'caption'}, for `data.pipeline`.

  Args:
    path: folder of the packages, see `icon_sets.read_sets`.
    size: side of the images in pixels.
    seed: of the world.
    split: 'train' or 'eval'.
    styles: names of styles; None: all that there are.
    things: their number, the everyday ones first; None: all that all styles
      but photos show.
    licences: SPDX names; sets with another licence are left out. None: all are
      used.
    mixture: {category: fraction}, adding up to 1; None: `MIXTURE`.
    num: number of scenes.

  Attributes:
    world: things and styles.

  Raises:
    DataError: there are no icon sets, or one is damaged.
    UsageError: no set has one of the styles and licences, there are too few
      things, SVG icons are to be rendered and resvg is not installed, or
      `mixture` is wrong, see `check_mixture`.
  """

  path_is = 'the folder of the icon packages'
  has_eval_split = endless = True

  def __init__(
    self,
    path: str | os.PathLike[str],
    size: int,
    *,
    seed: int = 0,
    split: str = 'train',
    styles: Sequence[str] | None = None,
    things: int | None = None,
    licences: Sequence[str] | None = None,
    mixture: Mapping[str, float] | None = None,
    num: int = 1_000_000,
  ) -> None:
    self.size, self.num = size, num
    mixture = MIXTURE if mixture is None else mixture
    check_mixture(mixture, MIXTURE)
    every = read_sets(path)
    every += read_stamps(path, icon_things.by_name(every))
    sets = _choose(every, styles, licences)
    chosen = icon_things.choose(sets, every, things)
    shown = [[one.of(thing.code) for thing in chosen] for one in sets]
    looks = tuple(tuple(map(len, of_style)) for of_style in shown)
    # The row of the first image of each thing in each style, among all.
    ends = np.cumsum(looks).reshape(len(sets), -1)
    self._rows = ends - looks
    self.world = World(
      chosen,
      tuple(s.style for s in sets),
      seed,
      split,
      mixture,
      looks if np.any(np.array(looks) != 1) else None,
    )
    images = [
      (f'{thing.name}, {one.style}', image)
      for one, of_style in zip(sets, shown)
      for thing, images in zip(chosen, of_style)
      for image in images
    ]
    names, data = zip(*images)
    self._digest = _digest(data)
    self._levels = icon_images.load(self._digest, names, data.__getitem__)

  def __getstate__(self) -> dict[str, typing.Any]:
    # A worker opens the files of the images, instead of getting a copy.
    stored = [getattr(level, 'filename', None) for level in self._levels]
    levels = stored if all(stored) else self._levels
    return self.__dict__ | {'_levels': levels}

  def __setstate__(self, state: dict[str, typing.Any]) -> None:
    self.__dict__ |= state
    if isinstance(self._levels, list):
      self._levels = icon_images.opened(self._levels)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the icons and of the names of what they show."""
    names = [(t.name, t.synonyms, t.heldout) for t in self.world.things]
    described: list[typing.Any] = [self._digest, names, self.world.styles]
    if self.world.looks is not None:
      described.append(self.world.looks)
    text = json.dumps(described)
    return hashlib.sha256(text.encode()).hexdigest()

  def categories(self) -> list[str]:
    """Those of `CATEGORIES` for which there are things."""

    def there_are(category: str) -> bool:
      try:
        return bool(scene(self.world, 0, category))
      except ValueError:
        return False

    return [category for category in CATEGORIES if there_are(category)]

  def scene(self, i: int, category: str | None = None) -> Scene:
    return scene(self.world, i, category)

  def render(self, scene: Scene) -> UInt8[np.ndarray, 'size size 3']:
    """The image of a scene, the mean over finer pixels below 256."""
    finer = max(1, min(4, 256 // self.size))
    side = finer * self.size
    image = Image.new('RGB', (side, side), BACKGROUNDS[scene.background])
    rows = self._rows[scene.style]
    shown = zip(scene.things, scene.looks, scene.places)
    for thing, look, (x, y, diameter) in shown:
      width = max(1, round(diameter * side))
      icon = self._icon(int(rows[thing]) + look, width)
      corner = round(x * side - width / 2), round(y * side - width / 2)
      image.paste(icon, corner, icon)
    return np.asarray(image.reduce(finer) if finer > 1 else image)

  def _icon(self, row: int, width: int) -> Image.Image:
    """An icon, resized from the smallest image that is large enough."""
    levels = [level for level in self._levels if level.shape[1] >= width]
    stored = Image.fromarray((levels or self._levels)[-1 if levels else 0][row])
    return stored.resize((width, width), Image.Resampling.BICUBIC)

  def __len__(self) -> int:
    return self.num

  def __getitem__(self, i: int) -> dict[str, typing.Any]:
    if not 0 <= i < self.num:
      raise IndexError(f'scene {i} of {self.num}')
    found = self.scene(int(i))
    return {'image': self.render(found), 'caption': found.caption}

  def caption(self, i: int) -> str:
    return self.scene(i).caption

  def name(self, i: int) -> str:
    return f'scene {i}'

  @classmethod
  def suite(cls, config: typing.Any) -> typing.Any:
    from imagen_jax.worlds.icons_suite import IconsSuite

    return IconsSuite.from_config(config)


def _choose(
  sets: Sequence[IconSet],
  styles: Sequence[str] | None,
  licences: Sequence[str] | None,
) -> list[IconSet]:
  """One set per style, in the order of the styles.

  Raises:
    UsageError: there is none of a style, or none at all.
  """
  allowed = [s for s in sets if licences is None or s.licence in licences]
  found = icon_things.by_style(allowed)
  if wrong := [s for s in styles or () if s not in found] or not found:
    there = ', '.join(f'{s.style} ({s.licence})' for s in sets)
    raise UsageError(
      f'data.styles is {styles} and data.licences {licences}; the icon sets at '
      f'data.path are {there}.',
      key='config.data.' + ('styles' if styles and wrong else 'licences'),
    )
  return [found[style] for style in styles or sorted(found)]


def _digest(data: Sequence[bytes]) -> str:
  """SHA-256 of icons and of how they are rendered."""
  found = hashlib.sha256(f'{icon_images.VERSION} {icon_images.SIDES}'.encode())
  for one in data:
    found.update(hashlib.sha256(one).digest())
  return found.hexdigest()
