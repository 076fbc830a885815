"""What the scenes of the shapes world show: random groups and relations."""

import dataclasses
import functools
import importlib.resources
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import OPPOSITE, Group, pick
from imagen_jax.worlds.render import contrast

CONTRAST = 75  # least RGB distance of a thing from its background

# Groups, and relations between them as in a `Meaning`.
Content: TypeAlias = tuple[Sequence[Group], Sequence[tuple[int, str, int]]]


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
def _colours_on(background: str, fill: str | None = None) -> tuple[str, ...]:
  """Colours with enough contrast on a background, and another name."""
  return tuple(
    c
    for c in captions.COLOURS
    if c != background and contrast(c, background, fill) >= CONTRAST
  )


def _group(rng: random.Random, background: str, **said: Any) -> Group:
  """A random group that is not held out, with the fields `said` fixed."""
  colours = _colours_on(background, said.get('fill'))
  while True:
    shape, colour = pick(rng, captions.SHAPES), pick(rng, colours)
    group = Group(**{'shape': shape, 'colour': colour} | said)
    if (group.colour, group.shape) in heldout()['colour_shape']:
      continue
    if (group.fill, group.shape) not in heldout()['fill_shape']:
      return group


def _filled(rng: random.Random, background: str) -> Group:
  return _group(rng, background, fill=pick(rng, captions.FILLS))


def _distinct(
  number: int,
  make: Callable[[random.Random, str], Group],
  rng: random.Random,
  background: str,
  *groups: Group,
) -> tuple[Group, ...]:
  """`groups` and new ones, `number` in all, that differ in colour or shape."""
  while len(groups) < number:
    new = make(rng, background)
    if all((new.colour, new.shape) != (g.colour, g.shape) for g in groups):
      groups = *groups, new
  return groups


def _size_word(rng: random.Random, probability: float) -> str | None:
  return pick(rng, captions.SIZES) if rng.random() < probability else None


def _single(rng: random.Random, background: str) -> Content:
  return [_group(rng, background, size=_size_word(rng, 0.45))], ()


def _pair(rng: random.Random, background: str) -> Content:
  return _several(rng, background, 2 if rng.random() < 0.75 else 3)


def _trio(rng: random.Random, background: str) -> Content:
  return _several(rng, background, 3)


def _several(rng: random.Random, background: str, number: int) -> Content:
  groups: Sequence[Group] = _distinct(number, _group, rng, background)
  if rng.random() < 0.25:  # 'a small red circle and a large blue square'
    groups = [dataclasses.replace(g, size=_size_word(rng, 0.7)) for g in groups]
  return groups, ()


def _relation(rng: random.Random, background: str) -> Content:
  held = heldout()['relation_pair']
  while True:
    number = 2 if rng.random() < 0.75 else 3
    groups = _distinct(number, _group, rng, background)
    relations = [(0, pick(rng, captions.RELATIONS), 1)]
    if number == 3:
      # On the other axis: the three form an L with the first as its corner.
      across = relations[0][1] in captions.RELATIONS[:2]
      others = captions.RELATIONS[2:] if across else captions.RELATIONS[:2]
      relations.append((0, pick(rng, others), 2))
    shown = {
      (word, groups[a].shape, groups[b].shape) for a, word, b in relations
    }
    if not shown & held:
      return groups, relations


def _count(rng: random.Random, background: str) -> Content:
  return _many(rng, background, 1 + int(rng.random() * 5))


def _crowd(rng: random.Random, background: str) -> Content:
  return _many(rng, background, 5 if rng.random() < 0.7 else 4)


def _many(rng: random.Random, background: str, number: int) -> Content:
  if number > 1 and rng.random() < 0.2:  # 'two red stars and a blue moon'
    first = 1 + int(rng.random() * (number - 1))
    groups = _distinct(2, _group, rng, background)
    counts = first, number - first
    return [dataclasses.replace(g, count=n) for g, n in zip(groups, counts)], ()
  size = 'small' if number > 1 and rng.random() < 0.25 else None
  return [_group(rng, background, count=number, size=size)], ()


def _fill(rng: random.Random, background: str) -> Content:
  first = _filled(rng, background)
  number = 2 if rng.random() < 0.3 else 1
  return _distinct(number, _filled, rng, background, first), ()


def _fill_pair(rng: random.Random, background: str) -> Content:
  return _distinct(2, _filled, rng, background), ()


def _heldout(rng: random.Random, background: str) -> Content:
  """A single, a fill or a relation built on one held-out combination."""
  kind = pick(rng, ('colour_shape', 'fill_shape', 'relation_pair'))
  while True:
    combination = pick(rng, sorted(heldout()[kind]))
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
      groups = [_group(rng, background, shape=shape) for shape in (a, b)]
      return groups, [(0, word, 1)]


# By category: (rng, background) -> content.
INVENT: dict[str, Callable[[random.Random, str], Content]] = {
  'single': _single,
  'pair': _pair,
  'relation': _relation,
  'count': _count,
  'fill': _fill,
  'fill_pair': _fill_pair,
  'trio': _trio,
  'crowd': _crowd,
  'heldout': _heldout,
}
