"""The judge of the shapes world: does an image show what its caption says?

`read` finds what is in the image, by classical vision; `judge` compares that
with the caption's meaning. An image is correct only if it shows everything the
caption says and nothing else. How often the judge itself errs is measured by
`benchmarks/shapes_judge.py`.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8

from imagen_jax.worlds.captions import Group, Meaning
from imagen_jax.worlds.reading import Found, Reading, read

# {aspect: verdict}; None: not claimed.
Aspects: TypeAlias = dict[str, bool | None]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """`correct`, and for each aspect True, False, or None if not claimed.

  Aspects: count, shape, colour, size, fill, relation, background.
  """

  correct: bool
  aspects: Aspects
  reading: Reading


def related(a: Found, word: str, b: Found) -> bool:
  """Whether found thing a is `word` thing b.

  As in GenEval (Ghosh et al. 2023): the offset of the centres along the word's
  direction, reduced by a tenth of the two extents, must exceed half of the
  whole offset.
  """
  dx, dy = a.x - b.x, a.y - b.y
  along = {'left of': -dx, 'right of': dx, 'above': -dy, 'below': dy}[word]
  across = word in ('left of', 'right of')
  extents = a.width + b.width if across else a.height + b.height
  return bool(along - 0.1 * extents > 0.5 * math.hypot(dx, dy))


def _aspects(
  meaning: Meaning,
  slots: Sequence[Group],
  things: Sequence[Found],
  first: Sequence[int],
) -> Aspects:
  """{aspect: verdict} of one matching, `things[i]` against `slots[i]`.

  `first` has the index of each group's first slot, and the number of slots.
  """

  def holds(field: str) -> bool | None:
    said = [
      (getattr(s, field), getattr(t, field)) for s, t in zip(slots, things)
    ]
    said = [pair for pair in said if None not in pair]
    return all(s == t for s, t in said) if said else None

  aspects = {f: holds(f) for f in ('shape', 'colour', 'size', 'fill')}
  if not meaning.relations:
    return aspects | {'relation': None}
  relation = all(
    related(things[i], word, things[j])
    for a, word, b in meaning.relations
    for i in range(first[a], first[a + 1])
    for j in range(first[b], first[b + 1])
  )
  return aspects | {'relation': relation}


def _violated(aspects: Aspects) -> int:
  return sum(value is False for value in aspects.values())


def judge(image: UInt8[np.ndarray, 'h w 3'], meaning: Meaning) -> Verdict:
  """Judges an image against a caption's meaning.

  Args:
    image: fills are judged only from 256 pixels up.
    meaning: of the caption.

  Returns and raises as `compare`.
  """
  return compare(read(image), meaning)


def compare(reading: Reading, meaning: Meaning) -> Verdict:
  """Judges what was read from an image against a caption's meaning.

  Returns:
    the `Verdict` of the matching that violates the fewest aspects, of all ways
    to match the things found to the things said.

  Raises:
    ValueError: the meaning has more than six things (the search is
      exhaustive).
  """
  slots = [g for g in meaning.groups for _ in range(g.count)]
  if len(slots) > 6:
    raise ValueError(f'{len(slots)} things are too many to judge; 6 at most')
  first = [0, *itertools.accumulate(g.count for g in meaning.groups)]
  things = reading.things
  aspects: Aspects = {'count': len(things) == len(slots)}
  if aspects['count']:
    ways = (
      _aspects(meaning, slots, way, first)
      for way in itertools.permutations(things)
    )
    best: Aspects = min(ways, key=_violated)
    aspects |= best
  else:
    for field in ('shape', 'colour'):
      said, seen = (
        collections.Counter(getattr(x, field) for x in some)
        for some in (slots, things)
      )
      aspects[field] = said == seen
    relation = False if meaning.relations else None
    aspects |= {'size': None, 'fill': None, 'relation': relation}
  aspects['background'] = (
    meaning.background == reading.background if meaning.background else None
  )
  return Verdict(_violated(aspects) == 0, aspects, reading)
