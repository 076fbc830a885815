"""The shapes world: captioned scenes, example i a pure function of its index.

A scene has one to five shapes on a plain background and a caption that a person
could have typed. There is nothing to download: `scene` generates example i of a
split from (seed, split, i) alone, and `render` renders it at any resolution.
The combinations in `heldout.json` never occur in the training split; they test
whether a model composes.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.errors import UsageError
from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import (
  OPPOSITE,
  Group,
  Meaning,
  describe,
  pick,
  vocabulary,
)
from imagen_jax.worlds.layout import LARGE, LEAST, diameter, place
from imagen_jax.worlds.nouns import shape_nouns
from imagen_jax.worlds.render import contrast, render
from imagen_jax.worlds.world import World

__all__ = [
  'CATEGORIES',
  'Scene',
  'ShapesSource',
  'Thing',
  'describe',
  'heldout',
  'render',
  'scene',
  'vocabulary',
]

SPLITS = ('train', 'eval')
CATEGORIES = ('single', 'pair', 'relation', 'count', 'fill', 'heldout')
# Fractions of the training mixture.
MIXTURE = {
  'single': 0.2,
  'pair': 0.2,
  'relation': 0.3,
  'count': 0.18,
  'fill': 0.12,
  'fill_pair': 0.0,  # 'fill', but always of two things
}
CONTRAST = 75  # least RGB distance of a thing from its background


@dataclasses.dataclass(frozen=True)
class Thing:
  """One rendered shape; x, y and diameter are fractions of the image."""

  shape: str
  colour: str
  fill: str
  x: float
  y: float
  diameter: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """A scene to render and its caption; `things` are in the meaning's order."""

  caption: str
  things: tuple[Thing, ...]
  background: str
  category: str
  meaning: Meaning


@functools.cache
def heldout() -> dict[str, frozenset[tuple[str, ...]]]:
  """The combinations held out of training, by kind.

  Kinds: 'colour_shape', 'fill_shape' and 'relation_pair'. Each (word, a, b) of
  'relation_pair' comes with its inverse: a star above a heart is a heart below
  a star.
  """
  path = importlib.resources.files('imagen_jax.worlds') / 'heldout.json'
  lists = json.loads(path.read_text(encoding='utf-8'))
  kinds = {k: frozenset(map(tuple, v)) for k, v in lists.items()}
  kinds['relation_pair'] |= {
    (OPPOSITE[word], b, a) for word, a, b in kinds['relation_pair']
  }
  return kinds


@functools.cache
def _listed(kind):
  return tuple(sorted(heldout()[kind]))


@functools.cache
def _colours_on(background, fill=None):
  """Colours with enough contrast on a background, and another name."""
  return tuple(
    c
    for c in captions.COLOURS
    if c != background and contrast(c, background, fill) >= CONTRAST
  )


def _group(rng, background, **said):
  """A random group that is not held out, with the fields `said` fixed."""
  colours = _colours_on(background, said.get('fill'))
  while True:
    group = Group(
      **{
        'shape': pick(rng, captions.SHAPES),
        'colour': pick(rng, colours),
        **said,
      }
    )
    if (group.colour, group.shape) in heldout()['colour_shape']:
      continue
    if (group.fill, group.shape) not in heldout()['fill_shape']:
      return group


def _groups(rng, background, number, **said):
  """Distinct groups: no two share both colour and shape."""
  groups = []
  while len(groups) < number:
    group = _group(rng, background, **said)
    if all((group.colour, group.shape) != (g.colour, g.shape) for g in groups):
      groups.append(group)
  return groups


def _size_word(rng, probability):
  return pick(rng, captions.SIZES) if rng.random() < probability else None


def _single(rng, background):
  return [_group(rng, background, size=_size_word(rng, 0.45))], ()


def _pair(rng, background):
  number = 2 if rng.random() < 0.75 else 3
  groups = _groups(rng, background, number)
  if rng.random() < 0.25:  # 'a small red circle and a large blue square'
    groups = [dataclasses.replace(g, size=_size_word(rng, 0.7)) for g in groups]
  return groups, ()


def _relation(rng, background):
  while True:
    number = 2 if rng.random() < 0.75 else 3
    groups = _groups(rng, background, number)
    relations = ((0, pick(rng, captions.RELATIONS), 1),)
    if number == 3:
      # On the other axis: the three form an L with the first as its corner.
      across = relations[0][1] in ('left of', 'right of')
      second = ('above', 'below') if across else ('left of', 'right of')
      relations += ((0, pick(rng, second), 2),)
    held = heldout()['relation_pair']
    if all(
      (word, groups[a].shape, groups[b].shape) not in held
      for a, word, b in relations
    ):
      return groups, relations


def _count(rng, background):
  number = 1 + int(rng.random() * 5)
  if number > 1 and rng.random() < 0.2:  # 'two red stars and a blue moon'
    first = 1 + int(rng.random() * (number - 1))
    groups = _groups(rng, background, 2)
    counts = first, number - first
    return [dataclasses.replace(g, count=n) for g, n in zip(groups, counts)], ()
  size = 'small' if number > 1 and rng.random() < 0.25 else None
  return [_group(rng, background, count=number, size=size)], ()


def _filled(rng, background, *others):
  """A group with a fill that differs from the others in colour or shape."""
  while True:
    group = _group(rng, background, fill=pick(rng, captions.FILLS))
    if all((group.colour, group.shape) != (g.colour, g.shape) for g in others):
      return group


def _fill(rng, background):
  first = _filled(rng, background)
  if rng.random() < 0.3:
    return [first, _filled(rng, background, first)], ()
  return [first], ()


def _fill_pair(rng, background):
  first = _filled(rng, background)
  return [first, _filled(rng, background, first)], ()


def _heldout(rng, background):
  """A single, a fill or a relation built on one held-out combination."""
  kind = pick(rng, ('colour_shape', 'fill_shape', 'relation_pair'))
  while True:
    combination = pick(rng, _listed(kind))
    if kind == 'colour_shape':
      colour, shape = combination
      if colour in _colours_on(background):
        return [Group(shape, colour)], ()
    elif kind == 'fill_shape':
      fill, shape = combination
      # The colour must be one that is trained with this shape.
      group = _group(rng, background, shape=shape)
      if group.colour in _colours_on(background, fill):
        return [dataclasses.replace(group, fill=fill)], ()
    else:
      word, a, b = combination
      first = _group(rng, background, shape=a)
      return [first, _group(rng, background, shape=b)], ((0, word, 1),)


_INVENT = {
  'single': _single,
  'pair': _pair,
  'relation': _relation,
  'count': _count,
  'fill': _fill,
  'fill_pair': _fill_pair,
  'heldout': _heldout,
}


def scene(
  seed: int,
  split: str,
  i: int,
  *,
  category: str | None = None,
  mixture: Mapping[str, float] | None = None,
) -> Scene:
  """Scene `i` of a split: a pure function of its arguments.

  Args:
    seed: any int.
    split: 'train' or 'eval'; they share no random stream, and only 'eval' has
      held-out combinations.
    i: any int >= 0.
    category: one of `CATEGORIES`, or None for the training mixture.
    mixture: {category: fraction}, adding up to 1; None: `MIXTURE`. Ignored if
      `category` is given.

  Returns:
    A `Scene`.

  Raises:
    ValueError: for an unknown split or category, or held-out scenes of
      'train'.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  if category not in (None, *CATEGORIES):
    raise ValueError(f'category {category!r} is not one of {CATEGORIES}')
  if (split, category) == ('train', 'heldout'):
    raise ValueError("held-out scenes are never in split 'train'")
  rng = random.Random(f'{seed}/{split}/{category}/{i}')
  if category is None:
    names, fractions = zip(*(mixture or MIXTURE).items())
    bounds = itertools.accumulate(fractions[:-1])
    r = rng.random()
    category = names[sum(r >= bound for bound in bounds)]
  background = pick(rng, captions.BACKGROUNDS)
  groups, relations = _INVENT[category](rng, background)
  named = background if rng.random() < 0.25 else None
  meaning = Meaning(tuple(groups), tuple(relations), named)
  number = sum(g.count for g in groups)
  sizes = [
    d
    for g in groups
    for d in [diameter(rng, g, number, category == 'single')] * g.count
  ]
  kinds = [g for g in groups for _ in range(g.count)]
  least = [LARGE[0] if g.size == 'large' else LEAST for g in kinds]
  sizes, places = place(rng, sizes, least, relations)
  things = tuple(
    Thing(g.shape, g.colour, g.fill or 'plain', x, y, d)
    for g, d, (x, y) in zip(kinds, sizes, places)
  )
  count_one = category == 'count' and len(groups) == 1 and number == 1
  caption = captions.write(rng, meaning, count_one=count_one)
  return Scene(caption, things, background, category, meaning)


def _check_mixture(mixture):
  for name, fraction in mixture.items():
    if name not in MIXTURE:
      raise UsageError(
        f'data.mixture names {name!r}; it can name {", ".join(MIXTURE)}.'
      )
    if not fraction >= 0:
      raise UsageError(
        f'data.mixture.{name} is {fraction}; it must be 0 or more.'
      )
  total = sum(mixture.values())
  if abs(total - 1) > 1e-6:
    raise UsageError(
      f'The fractions of data.mixture add up to {total:g}, not 1.'
    )


class ShapesSource(World):
  """Random-access source of {'image', 'caption'}, for `data.pipeline`.

  Picklable and stateless: element i is `scene(seed, split, i)` rendered at
  `size`, so a reader may skip, shuffle and shard it freely.

  Args:
    seed: of the world.
    split: 'train' or 'eval'.
    size: side of the images in pixels.
    num: number of scenes.
    category: None for the training mixture.
    mixture: as in `scene`.

  Raises:
    UsageError: `mixture` has an unknown category or a negative fraction, or
      does not add up to 1.
  """

  nouns = staticmethod(shape_nouns)

  def __init__(
    self,
    seed: int = 0,
    split: str = 'train',
    size: int = 64,
    num: int = 1_000_000,
    category: str | None = None,
    mixture: Mapping[str, float] | None = None,
  ) -> None:
    self.seed, self.split, self.size = seed, split, size
    self.num, self.category = num, category
    self.mixture = mixture
    if mixture is not None:
      _check_mixture(mixture)

  @classmethod
  def prompt_notes(cls, prompts: Sequence[str]) -> Sequence[str]:
    words = [word for prompt in prompts for word in captions.words(prompt)]
    unknown = [word for word in words if word not in vocabulary()]
    if not unknown:
      return ()
    named = ', '.join(dict.fromkeys(unknown))
    return (f'the model has never seen {named} in a caption. {describe()}',)

  def __len__(self) -> int:
    return self.num

  def __getitem__(self, i: int) -> dict[str, Any]:
    """{'image': uint8 [size, size, 3], 'caption': str}."""
    i = int(i)
    if not 0 <= i < self.num:
      raise IndexError(f'scene {i} of {self.num}')
    s = scene(
      self.seed,
      self.split,
      i,
      category=self.category,
      mixture=self.mixture,
    )
    return {'image': render(s, self.size), 'caption': s.caption}

  @staticmethod
  def scenes(seed, split, number, *, heldout=False):
    category = 'heldout' if heldout else None
    return [scene(seed, split, i, category=category) for i in range(number)]

  @classmethod
  def suite(cls, config: Any) -> Any:
    from imagen_jax.worlds.suite import ShapesSuite

    return ShapesSuite.from_config(config)
