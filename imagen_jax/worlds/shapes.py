"""The shapes world: captioned scenes, example i a pure function of its index.

A scene has one to five shapes on a plain background and a caption that a person
could have typed. There is nothing to download: `scene` generates example i of a
split from (seed, split, i) alone, and `render` renders it at any resolution.
The combinations in `heldout.json` never occur in the training split; they test
whether a model composes.
"""

import dataclasses
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.text.tokenizer import Tokenizer
from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import Meaning, describe, pick, vocabulary
from imagen_jax.worlds.contents import INVENT
from imagen_jax.worlds.layout import LARGE, LEAST, diameter, place
from imagen_jax.worlds.render import render
from imagen_jax.worlds.world import World, check_mixture

SPLITS = ('train', 'eval')
CATEGORIES = ('single', 'pair', 'relation', 'count', 'fill', 'heldout')
# {a word of a caption: the colour or shape that it names}
COLOUR_WORDS = captions.synonyms(captions.COLOURS)
SHAPE_WORDS = captions.synonyms(captions.SHAPES)
SHAPE_WORDS |= {captions.plural(way): word for way, word in SHAPE_WORDS.items()}
# Fractions of the training mixture.
MIXTURE = {
  'single': 0.2,
  'pair': 0.2,
  'relation': 0.3,
  'count': 0.18,
  'fill': 0.12,
  'fill_pair': 0.0,  # 'fill', but always of two things
  'trio': 0.0,  # 'pair', but always of three
  'crowd': 0.0,  # 'count', but always of four or five
}


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
  groups, relations = INVENT[category](rng, background)
  named = background if rng.random() < 0.25 else None
  meaning = Meaning(tuple(groups), tuple(relations), named)
  kinds = [g for g in groups for _ in range(g.count)]
  number = len(kinds)
  sizes = [
    d
    for g in groups
    for d in [diameter(rng, g, number, category == 'single')] * g.count
  ]
  least = [LARGE[0] if g.size == 'large' else LEAST for g in kinds]
  sizes, places = place(rng, sizes, least, relations)
  things = tuple(
    Thing(g.shape, str(g.colour), g.fill or 'plain', x, y, d)
    for g, d, (x, y) in zip(kinds, sizes, places)
  )
  count_one = category == 'count' and number == 1
  caption = captions.write(rng, meaning, count_one=count_one)
  return Scene(caption, things, background, category, meaning)


def nouns(
  tokenizer: Tokenizer, caption: str, meaning: Meaning
) -> list[tuple[int, int]]:
  """Where things are named: [(position of the noun's last token, group)].

  A noun belongs to the group with its shape and the last colour before it, so
  the caption may name the groups in any order. Words are tokenized one by one,
  as sentencepiece does.
  """
  found, position, colour = [], 0, None
  groups = [(g.shape, g.colour) for g in meaning.groups]
  for word in caption.lower().split():
    bare = word.strip('.,')
    colour = COLOUR_WORDS.get(bare, colour)
    key = SHAPE_WORDS.get(bare, ''), colour
    if key in groups:
      last = position + len(tokenizer.pieces(bare)) - 1
      found.append((last, groups.index(key)))
    position += len(tokenizer.pieces(word))
  return found


class ShapesSource(World):
  """Random-access source of {'image', 'caption'}, for `data.pipeline`.

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

  nouns = staticmethod(nouns)

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
    self.num, self.category, self.mixture = num, category, mixture
    if mixture is not None:
      check_mixture(mixture, MIXTURE)

  @classmethod
  def prompt_notes(cls, prompts: Sequence[str]) -> Sequence[str]:
    words = [word for prompt in prompts for word in captions.words(prompt)]
    unknown = [word[:40] for word in words if word not in vocabulary()]
    if not unknown:
      return ()
    distinct = list(dict.fromkeys(unknown))
    more = [f'{len(distinct) - 20} more words'] if len(distinct) > 20 else []
    named = ', '.join(distinct[:20] + more)
    return (f'the model has never seen {named} in a caption. {describe()}',)

  def scene(self, i: int) -> Scene:
    return scene(
      self.seed, self.split, i, category=self.category, mixture=self.mixture
    )

  def render(self, scene: Scene) -> UInt8[np.ndarray, 'size size 3']:
    return render(scene, self.size)

  @staticmethod
  def scenes(
    seed: int, split: str, number: int, *, heldout: bool = False
  ) -> list[Scene]:
    category = 'heldout' if heldout else None
    return [scene(seed, split, i, category=category) for i in range(number)]

  @classmethod
  def suite(cls, config: Any) -> Any:
    from imagen_jax.worlds.suite import ShapesSuite

    return ShapesSuite.from_config(config)
