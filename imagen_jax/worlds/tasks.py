"""Pretraining tasks of a small text encoder, on captions alone.

Two tasks share one encoder and one small decoder. Span corruption is T5's own
objective (Raffel et al. 2020, Section 3.1.4). Description has the decoder
describe one thing of the caption, in a fixed word order, from the embedding of
that thing's noun and nothing else; it makes each noun's embedding a summary of
its thing's attributes and relations.
"""

import dataclasses
import random
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict

from imagen_jax.errors import UsageError
from imagen_jax.text.tokenizer import EOS, PAD, Tokenizer
from imagen_jax.worlds import captions, probe
from imagen_jax.worlds.captions import Meaning
from imagen_jax.worlds.world import Scene, World

SENTINELS = 8  # <extra_id_0> … <extra_id_7>, the last ids, counted downwards
TARGET_LEN = 20  # the longest description has 17 tokens
ATTEMPTS = 20  # to make an item that is short enough


class Item(NamedTuple):
  """One example.

  Attributes:
    ids: the encoder's tokens.
    visible: the only position that the decoder sees; None: all of them.
    target: the decoder's tokens.
  """

  ids: list[int]
  visible: int | None
  target: list[int]


def description(meaning: Meaning, group: int) -> str:
  """One thing in a fixed word order: attributes, relations, background."""
  g = meaning.groups[group]
  words = [captions.NUMBERS[g.count - 1], g.size, g.fill, g.colour, g.shape]
  for word, other in probe.relations_of(meaning, group):
    words += [word, meaning.groups[other].colour, meaning.groups[other].shape]
  if meaning.background:
    words += ['on', meaning.background]
  return ' '.join(word for word in words if word)


def corrupt(
  rng: random.Random,
  ids: Sequence[int],
  first_sentinel: int,
  *,
  density: float,
  mean_span: float,
) -> tuple[list[int], list[int]]:
  """Span corruption of one caption: (input ids, target ids).

  A fraction `density` of the tokens is removed, in spans of `mean_span` on
  average. A sentinel takes the place of each span, counted down from
  `first_sentinel`; the target is each sentinel followed by its span.
  """
  number = max(1, round(density * len(ids)))
  spans = min(max(1, round(number / mean_span)), SENTINELS)
  # Random compositions: lengths of the spans, and of the gaps between them.
  lengths = _compose(rng, number, spans)
  gaps = _compose(rng, len(ids) - number + 2, spans + 1)
  gaps[0] -= 1  # the first gap may be empty, and the last
  left, missing, at = [], [], 0
  for k, (gap, length) in enumerate(zip(gaps, lengths)):
    start = at + gap
    left += [*ids[at:start], first_sentinel - k]
    at = start + length
    missing += [first_sentinel - k, *ids[start:at]]
  return left + list(ids[at:]), missing


def _compose(rng: random.Random, total: int, parts: int) -> list[int]:
  """Random integers >= 1 with the given sum: `parts`, or `total` if fewer."""
  cuts = sorted(rng.sample(range(1, total), min(parts, total) - 1))
  return [b - a for a, b in zip([0, *cuts], [*cuts, total])]


def _with_unknown_words(rng: random.Random, caption: str) -> str:
  """The caption with one or two random out-of-vocabulary words inserted."""
  words = caption.split()
  for _ in range(1 + (rng.random() < 0.3)):
    word = ''.join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7)))
    words.insert(rng.randint(0, len(words)), word)
  return ' '.join(words)


@dataclasses.dataclass(frozen=True)
class Tasks:
  """Makes random tasks on the captions of a world.

  Attributes:
    world: finds the nouns of a caption.
    tokenizer: of the encoder.
    config: the section `tasks`.
  """

  world: type[World]
  tokenizer: Tokenizer
  config: ConfigDict

  def item(self, rng: random.Random, scene: Scene) -> Item:
    """A task of at most `max_len` input and `TARGET_LEN` target tokens.

    Raises:
      UsageError: none of `ATTEMPTS` tasks fits.
    """
    max_len = self.config.max_len
    for _ in range(ATTEMPTS):
      spans = rng.random() < self.config.span_fraction
      item = (self._corruption if spans else self._description)(rng, scene)
      if len(item.ids) <= max_len and len(item.target) <= TARGET_LEN:
        return item
    raise UsageError(
      f'the caption {scene.caption!r} does not fit tasks.max_len = {max_len} '
      'tokens; set a larger one.'
    )

  def _corruption(self, rng: random.Random, scene: Scene) -> Item:
    left, missing = corrupt(
      rng,
      self.tokenizer.pieces(scene.caption),
      self.tokenizer.size + SENTINELS - 1,
      density=self.config.span_density,
      mean_span=self.config.mean_span,
    )
    return Item([*left, EOS], None, [*missing, EOS])

  def _description(self, rng: random.Random, scene: Scene) -> Item:
    caption, pieces = scene.caption, self.tokenizer.pieces
    if rng.random() < self.config.oov_fraction:
      caption = _with_unknown_words(rng, caption)
    found = self.world.nouns(self.tokenizer, caption, scene.meaning)
    if not found:  # an unknown word has come between 'palm' and 'tree'
      caption = scene.caption
      found = self.world.nouns(self.tokenizer, caption, scene.meaning)
    position, group = rng.choice(found)
    target = pieces(description(scene.meaning, group))
    return Item([*pieces(caption), EOS], position, [*target, EOS])


def as_arrays(item: Item, max_len: int) -> dict[str, np.ndarray]:
  """An item as a row of a batch: ids, mask, visible [L], target [T]."""
  ids = _padded(item.ids, max_len)
  mask = ids != PAD
  visible = mask
  if item.visible is not None:
    visible = np.arange(max_len) == item.visible
  target = _padded(item.target, TARGET_LEN)
  return {'ids': ids, 'mask': mask, 'visible': visible, 'target': target}


def _padded(ids: Sequence[int], length: int) -> Int32[np.ndarray, ' length']:
  return np.pad(np.array(ids, np.int32), (0, length - len(ids)))
