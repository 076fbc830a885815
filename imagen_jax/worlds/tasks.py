"""What a small text encoder is pretrained on: captions alone.

Two tasks share one encoder and one small decoder, which is thrown away:
span corruption, as T5 was trained (Raffel et al. 2020, Section 3.1.4), and
descriptions: of one thing of the caption, in a fixed order of words, by a
decoder that sees the embedding of that thing's noun and nothing else. The
second makes each noun a summary of its thing: what is said of it, and where it
stands.
"""

import random
import string
from typing import Any, NamedTuple

import numpy as np

from imagen_jax.text.tokenizer import EOS, PAD, Tokenizer
from imagen_jax.worlds import captions, probe

SENTINELS = 8  # <extra_id_0> … <extra_id_7>, the last ids, counted downwards
TARGET_LEN = 20  # the longest description has 17 tokens
ATTEMPTS = 20  # at an item that is short enough


class Item(NamedTuple):
  """One example.

  Attributes:
    ids: of the encoder's tokens.
    visible: the position that the decoder sees, None for all of them.
    target: ids of what the decoder should say.
  """

  ids: list[int]
  visible: int | None
  target: list[int]


def description(meaning: captions.Meaning, group: int) -> str:
  """One thing in words of a fixed order, with what it relates to."""
  g = meaning.groups[group]
  words = [captions.NUMBERS[g.count - 1], g.size, g.fill, g.colour, g.shape]
  for word, other in probe.relations_of(meaning, group):
    b = meaning.groups[other]
    words += [word, b.colour, b.shape]
  if meaning.background:
    words += ['on', meaning.background]
  return ' '.join(word for word in words if word)


def corrupt(rng, ids, first_sentinel, *, density, mean_span):
  """Span corruption of one caption: (what is left, what is missing).

  About `density` of the tokens go, in spans of `mean_span` on average. Each
  span leaves a sentinel, counted down from `first_sentinel`; the target is
  each sentinel followed by its span.
  """
  number = max(1, round(density * len(ids)))
  spans = min(max(1, round(number / mean_span)), SENTINELS)
  # Random compositions: lengths of the spans, and of what lies between.
  lengths = _compose(rng, number, spans)
  gaps = _compose(rng, len(ids) - number + 2, spans + 1)
  gaps[0], gaps[-1] = gaps[0] - 1, gaps[-1] - 1
  left, missing, at = [], [], 0
  for k in range(spans):
    left += [*ids[at : at + gaps[k]], first_sentinel - k]
    at += gaps[k]
    missing += [first_sentinel - k, *ids[at : at + lengths[k]]]
    at += lengths[k]
  return left + list(ids[at:]), missing


def _compose(rng, total, parts):
  """`parts` whole numbers >= 1 of the given sum (0s where it is too small)."""
  parts = min(parts, total)
  cuts = sorted(rng.sample(range(1, total), parts - 1))
  return [b - a for a, b in zip([0, *cuts], [*cuts, total])]


def _with_unknown_words(rng, caption):
  """The caption with one or two words put in that nobody has ever seen."""
  words = caption.split()
  for _ in range(1 + (rng.random() < 0.3)):
    word = ''.join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7)))
    words.insert(rng.randint(0, len(words)), word)
  return ' '.join(words)


def make_item(
  rng: random.Random, scene: Any, nouns, tokenizer: Tokenizer, tasks: Any
) -> Item:
  """A random task on a scene's caption.

  Args:
    rng: of the choice.
    scene: with `caption` and `meaning`.
    nouns: finds the nouns of a caption, see `World.nouns`.
    tokenizer: of the encoder.
    tasks: the config's section: `span_fraction`, `span_density`, `mean_span`,
      `oov_fraction`.
  """
  first_sentinel = tokenizer.size + SENTINELS - 1
  if rng.random() < tasks.span_fraction:
    ids = tokenizer.pieces(scene.caption)
    left, missing = corrupt(
      rng,
      ids,
      first_sentinel,
      density=tasks.span_density,
      mean_span=tasks.mean_span,
    )
    return Item([*left, EOS], None, [*missing, EOS])
  caption = scene.caption
  if rng.random() < tasks.oov_fraction:
    caption = _with_unknown_words(rng, caption)
  found = nouns(tokenizer, caption, scene.meaning)
  if not found:  # an unknown word has come between 'palm' and 'tree'
    caption = scene.caption
    found = nouns(tokenizer, caption, scene.meaning)
  position, group = rng.choice(found)
  target = tokenizer.pieces(description(scene.meaning, group))
  return Item([*tokenizer.pieces(caption), EOS], position, [*target, EOS])


def fitting_item(rng, scene, nouns, tokenizer, tasks, max_len) -> Item:
  """`make_item` until it fits `max_len` tokens and `TARGET_LEN` of them.

  Raises:
    ValueError: the caption is too long for any task.
  """
  for _ in range(ATTEMPTS):
    item = make_item(rng, scene, nouns, tokenizer, tasks)
    if len(item.ids) <= max_len and len(item.target) <= TARGET_LEN:
      return item
  raise ValueError(f'{scene.caption!r} does not fit {max_len} tokens')


def as_arrays(item: Item, max_len: int) -> dict[str, np.ndarray]:
  """An item as a row of a batch: ids, mask, visible [L], target [T]."""
  ids = np.full(max_len, PAD, np.int32)
  ids[: len(item.ids)] = item.ids
  mask = ids != PAD
  visible = mask
  if item.visible is not None:
    visible = np.arange(max_len) == item.visible
  target = np.full(TARGET_LEN, PAD, np.int32)
  target[: len(item.target)] = item.target
  return {'ids': ids, 'mask': mask, 'visible': visible, 'target': target}
