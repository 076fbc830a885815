"""Linear probe of a frozen text encoder.

The probe reads one token per thing, its noun: in "a small red star above a blue
moon" the embedding at "star" must encode red, small, star and above, and the
embedding at "moon" blue and below. The keys and values of a U-Net's
cross-attention are linear maps, too.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from imagen_jax.text.encoder import TextEncoder
from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import Meaning
from imagen_jax.worlds.world import Scene, World

Facts: TypeAlias = dict[str, str]
# Features [N, D], and the facts of each.
Labelled: TypeAlias = tuple[Float[np.ndarray, 'n d'], list[Facts]]
Scores: TypeAlias = dict[str, dict[str, float]]

ACROSS, DOWN = captions.RELATIONS[:2], captions.RELATIONS[2:]
ASPECTS = ('shape', 'colour', 'count', 'size', 'fill', 'across', 'down')
# The aspects that the gate checks.
GATE = ('shape', 'colour', 'across', 'down')


def relations_of(meaning: Meaning, group: int) -> list[tuple[str, int]]:
  """[(word, other group)] of one group, as subject or as object."""
  return [
    (word, b) if a == group else (captions.OPPOSITE[word], a)
    for a, word, b in meaning.relations
    if group in (a, b)
  ]


def facts(meaning: Meaning, group: int) -> Facts:
  """{aspect: value} of one group; 'none' where the caption does not say."""
  g = meaning.groups[group]
  words = [word for word, _ in relations_of(meaning, group)]
  found = {
    'shape': g.shape,
    'colour': g.colour,
    'count': str(g.count),
    'size': g.size,
    'fill': g.fill,
    'across': next((w for w in words if w in ACROSS), None),
    'down': next((w for w in words if w in DOWN), None),
  }
  return {aspect: value or 'none' for aspect, value in found.items()}


def features(
  encoder: TextEncoder, world: type[World], scenes: Sequence[Scene]
) -> Labelled:
  """Embeddings of the nouns, and their facts."""
  emb, _ = encoder.encode([s.caption for s in scenes], batch_size=256)
  rows, labels = [], []
  for i, s in enumerate(scenes):
    for position, group in world.nouns(encoder.tokenizer, s.caption, s.meaning):
      if position < emb.shape[1]:
        rows.append(emb[i, position])
        labels.append(facts(s.meaning, group))
  return np.stack(rows).astype(np.float64), labels


def linear_readout(
  fit: Labelled, tests: Mapping[str, Labelled], *, ridge: float = 1e-3
) -> Scores:
  """Accuracy of least squares onto one-hot facts, per aspect and test set.

  Args:
    fit: features and facts to fit.
    tests: by name.
    ridge: weight decay, relative to the features' variance.

  Returns:
    {name: {aspect: accuracy in [0, 1]}}, without aspects that are constant in
    `fit`.
  """
  x, labels = fit
  mean, deviation = x.mean(0), x.std(0) + 1e-6

  def design(x: Float[np.ndarray, 'n d']) -> Float[np.ndarray, 'n d1']:
    return np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=1)

  a = design(x)
  gram = a.T @ a + ridge * len(a) * np.eye(a.shape[1])
  scores: Scores = {name: {} for name in tests}
  for aspect in ASPECTS:
    values = sorted({label[aspect] for label in labels})
    if len(values) == 1:
      continue
    y = np.array([[lab[aspect] == v for v in values] for lab in labels])
    w = np.linalg.solve(gram, a.T @ y)
    for name, (x_test, wanted) in tests.items():
      read = np.argmax(design(x_test) @ w, axis=1)
      right = [values[r] == lab[aspect] for r, lab in zip(read, wanted)]
      scores[name][aspect] = float(np.mean(right))
  return scores


def probe(
  encoder: TextEncoder,
  world: type[World],
  *,
  num_fit: int = 4000,
  num_test: int = 2000,
  seed: int = 0,
) -> Scores:
  """Fits on training captions, tests on unseen ones.

  Returns:
    {'eval' | 'heldout': {aspect: accuracy}}; 'heldout' captions have
    combinations that are held out of training.
  """

  def take(split: str, number: int, heldout: bool = False) -> Labelled:
    scenes = world.scenes(seed, split, number, heldout=heldout)
    return features(encoder, world, scenes)

  return linear_readout(
    take('train', num_fit),
    {
      'eval': take('eval', num_test),
      'heldout': take('eval', num_test, heldout=True),
    },
  )


def passes(scores: Scores, least: float = 0.99) -> bool:
  """Whether every aspect of `GATE` has at least this accuracy."""
  return all(
    s.get(aspect, 1) >= least for s in scores.values() for aspect in GATE
  )


def table(scores: Scores) -> str:
  """The accuracies in percent, one line per test set."""
  return '\n'.join(
    f'  {name:8}' + '  '.join(f'{a} {100 * v:.2f}' for a, v in score.items())
    for name, score in scores.items()
  )
