"""Scenes of icons: what they show, and the captions that say so.

`scene` is a pure function of its arguments. A caption names the things, and
mostly their style; where it says nothing of the background, that is white, and
where it says nothing of the place, one thing is in the middle.
"""

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence

from imagen_jax.worlds import captions, icon_captions
from imagen_jax.worlds.captions import pick
from imagen_jax.worlds.icon_things import (
  Thing,
  held_pair,
  held_style,
  is_plural,
)
from imagen_jax.worlds.layout import BORDER, place, uniform

# Fractions of the training mixture.
MIXTURE = {'single': 0.55, 'count': 0.15, 'pair': 0.3}
CATEGORIES = (*MIXTURE, 'heldout_style', 'heldout_pair', 'synonym')
BACKGROUNDS = {
  'white': (255, 255, 255),
  'black': (12, 12, 16),
  'grey': (190, 193, 199),
  'red': (238, 140, 132),
  'orange': (252, 205, 150),
  'yellow': (252, 236, 160),
  'green': (178, 222, 172),
  'blue': (165, 205, 245),
  'purple': (208, 184, 240),
  'pink': (250, 205, 222),
}
PLACES = {
  'on the left': (0, None),
  'on the right': (1, None),
  'at the top': (None, 0),
  'at the bottom': (None, 1),
  'in the top left corner': (0, 0),
  'in the top right corner': (1, 0),
  'in the bottom left corner': (0, 1),
  'in the bottom right corner': (1, 1),
}
LARGEST = (0.8, 0.43, 0.39, 0.38)  # diameter, by the number of things


@dataclasses.dataclass(frozen=True)
class Group:
  """`count` (1 to 4) of a thing, by its index among the things."""

  thing: int
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Scene:
  """A scene to render and its caption.

  Attributes:
    caption: what a user might type.
    category: one of `CATEGORIES`.
    style: index of the style of all things.
    groups: one or two.
    relation: of the first group to the second, if any.
    background: its name.
    places: (x, y, diameter) of each thing, in the order of the groups, in
      fractions of the image.
    looks: of each thing the index of its image, among those of the style.
  """

  caption: str
  category: str
  style: int
  groups: tuple[Group, ...]
  relation: str | None
  background: str
  places: tuple[tuple[float, float, float], ...]
  looks: tuple[int, ...]

  @property
  def things(self) -> list[int]:
    """The index of each thing that is shown."""
    return [g.thing for g in self.groups for _ in range(g.count)]


@dataclasses.dataclass(frozen=True)
class World:
  """What scenes are made of.

  Attributes:
    things, styles: that exist.
    seed: any int.
    split: 'train' or 'eval'; they share no random stream.
    mixture: {category: fraction} of the scenes.
    looks: of each style the number of images of each thing, 0 where it does not
      show it; None: one of each.
  """

  things: tuple[Thing, ...]
  styles: tuple[str, ...]
  seed: int = 0
  split: str = 'train'
  mixture: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: MIXTURE
  )
  looks: tuple[tuple[int, ...], ...] | None = None

  def number_of_looks(self, style: int, thing: int) -> int:
    return 1 if self.looks is None else self.looks[style][thing]

  @functools.cached_property
  def held(self) -> tuple[str | None, ...]:
    """Of each thing the style that is held out, if any."""
    return tuple(
      held_style(
        thing,
        [s for i, s in enumerate(self.styles) if self.number_of_looks(i, t)],
      )
      for t, thing in enumerate(self.things)
    )

  @functools.cached_property
  def free(self) -> tuple[tuple[int, ...], ...]:
    """Of each style the things that training shows in it."""
    return tuple(
      tuple(
        t
        for t, held in enumerate(self.held)
        if held != style and self.number_of_looks(i, t)
      )
      for i, style in enumerate(self.styles)
    )


def scene(world: World, i: int, category: str | None = None) -> Scene:
  """Scene `i` of a world.

  Args:
    world: of the things.
    i: any int ≥ 0.
    category: one of `CATEGORIES`; None: as the world's mixture has it.

  Raises:
    ValueError: nothing is held out that the category could show, or the split
      is 'train' and the category held out.
  """
  if category not in (None, *MIXTURE) and world.split == 'train':
    raise ValueError(f"scenes of {category} are never in split 'train'")
  rng = random.Random(f'icons/{world.seed}/{world.split}/{category}/{i}')
  if category is None:
    fractions = [world.mixture.get(name, 0) for name in MIXTURE]
    category = rng.choices(list(MIXTURE), fractions)[0]
  style, groups = _contents(rng, world, category)
  related = len(groups) == 2 and rng.random() < 0.7
  relation = pick(rng, captions.RELATIONS) if related else None
  lone = len(groups) == groups[0].count == 1
  size = pick(rng, captions.SIZES) if lone and rng.random() < 0.15 else None
  where = pick(rng, tuple(PLACES)) if lone and rng.random() < 0.15 else None
  colour = pick(rng, tuple(BACKGROUNDS)) if rng.random() < 0.5 else None
  places = (
    [_alone(rng, size, where)] if lone else _together(rng, groups, relation)
  )
  shown = [
    (icon_captions.name(rng, world.things[g.thing], category), g.count)
    for g in groups
  ]
  styled = rng.random() < 0.9 or category == 'heldout_style'
  text, after = icon_captions.write(
    rng, shown, world.styles[style], styled, size, relation
  )
  text += f' {where}' if where else ''
  text += icon_captions.background(rng, colour) + after
  if rng.random() < 0.1:
    text = text[0].upper() + text[1:] + '.'
  looks = (
    world.number_of_looks(style, g.thing)
    for g in groups
    for _ in range(g.count)
  )
  return Scene(
    text,
    category,
    style,
    tuple(groups),
    relation,
    colour or 'white',
    tuple(places),
    tuple(int(rng.random() * n) if n > 1 else 0 for n in looks),
  )


def _contents(
  rng: random.Random, world: World, category: str
) -> tuple[int, list[Group]]:
  """The style, and one or two groups that it may show."""
  things, styles = world.things, world.styles
  if category == 'heldout_style':
    held = [t for t, style in enumerate(world.held) if style]
    thing = pick(rng, _some(held, category))
    return styles.index(str(world.held[thing])), [Group(thing)]
  style = int(rng.random() * len(styles))
  free: Sequence[int] = world.free[style]
  if category == 'synonym':
    free = [t for t in free if things[t].heldout]
  if category in ('single', 'synonym'):
    return style, [Group(pick(rng, _some(free, category)))]
  if category == 'count':
    countable = [t for t in free if not is_plural(things[t].name)]
    many = pick(rng, (2, 3, 4))
    return style, [Group(pick(rng, _some(countable, category)), many)]
  wanted, free = category == 'heldout_pair', _some(free, category)
  for _ in range(1000):
    first, second = pick(rng, free), pick(rng, free)
    untrained = held_pair(things[first], things[second])
    if second != first and untrained == wanted:
      return style, [Group(first), Group(second)]
  raise _nothing(category)


def _nothing(category: str) -> ValueError:
  return ValueError(f'no things for a scene of category {category}')


def _some(things: Sequence[int], category: str) -> Sequence[int]:
  if not things:
    raise _nothing(category)
  return things


def _alone(
  rng: random.Random, size: str | None, where: str | None
) -> tuple[float, float, float]:
  """(x, y, diameter) of a thing alone."""
  low, high = {
    'small': (0.3, 0.38),
    'large': (0.8, 0.9),
    None: (0.4, 0.5) if where else (0.62, 0.8),
  }[size]
  if where and size == 'large':
    low, high = 0.5, 0.6
  d = uniform(rng, low, high)
  across, down = PLACES[where] if where else (None, None)
  first, last = BORDER + d / 2, 1 - BORDER - d / 2

  def at(side: int | None) -> float:
    if side is None:  # about the middle
      return 0.5 + uniform(rng, -0.3, 0.3) * (last - first)
    return (last if side else first) + (
      (0.15 - 0.3 * side) * rng.random() * (last - first)
    )

  return at(across), at(down), d


def _together(
  rng: random.Random, groups: Sequence[Group], relation: str | None
) -> list[tuple[float, float, float]]:
  """(x, y, diameter) of several things, of one size in each group."""
  number = sum(g.count for g in groups)
  sizes = [
    d
    for g in groups
    for d in [uniform(rng, 0.85, 1) * LARGEST[number - 1]] * g.count
  ]
  between = [(0, relation, 1)] if relation else []
  sizes, centres = place(rng, sizes, [0.2] * number, between)
  return [(x, y, d) for (x, y), d in zip(centres, sizes)]
