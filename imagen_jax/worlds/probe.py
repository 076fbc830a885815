"""Linear probe of a frozen text encoder.

The probe reads one token per thing, its noun: in "a small red star above a blue
moon" the embedding at "star" must encode red, small, star and above, and the
embedding at "moon" blue and below. The keys and values of a U-Net's
cross-attention are linear maps, too.
"""

import numpy as np

from imagen_jax.worlds import captions
from imagen_jax.worlds.world import World

ACROSS, DOWN = captions.RELATIONS[:2], captions.RELATIONS[2:]
ASPECTS = ('shape', 'colour', 'count', 'size', 'fill', 'across', 'down')
# The aspects that the gate checks.
GATE = ('shape', 'colour', 'across', 'down')


def relations_of(meaning, group):
  """[(word, other group)] of one group, as subject or as object."""
  return [
    (word, b) if a == group else (captions.OPPOSITE[word], a)
    for a, word, b in meaning.relations
    if group in (a, b)
  ]


def facts(meaning, group):
  """{aspect: value} of one group; 'none' where the caption does not say."""
  g = meaning.groups[group]
  words = [word for word, _ in relations_of(meaning, group)]
  return {
    'shape': g.shape,
    'colour': g.colour or 'none',
    'count': str(g.count),
    'size': g.size or 'none',
    'fill': g.fill or 'none',
    'across': next((w for w in words if w in ACROSS), 'none'),
    'down': next((w for w in words if w in DOWN), 'none'),
  }


def features(encoder, scenes, find):
  """Embeddings of the nouns [N, D] and their facts, a list of N dicts."""
  emb, _ = encoder.encode([s.caption for s in scenes], batch_size=256)
  rows, labels = [], []
  for i, s in enumerate(scenes):
    for position, group in find(encoder.tokenizer, s.caption, s.meaning):
      if position < emb.shape[1]:
        rows.append(emb[i, position])
        labels.append(facts(s.meaning, group))
  return np.stack(rows).astype(np.float64), labels


def linear_readout(x, labels, tests, *, ridge=1e-3):
  """Accuracy of least squares onto one-hot facts, per aspect and test set.

  Args:
    x: [N, D] features to fit on.
    labels: their facts.
    tests: {name: (features, facts)}.
    ridge: weight decay, relative to the features' variance.

  Returns:
    {name: {aspect: accuracy in [0, 1]}}, without aspects that are constant in
    `labels`.
  """
  mean, deviation = x.mean(0), x.std(0) + 1e-6

  def design(x):
    return np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=1)

  a = design(x)
  gram = a.T @ a + ridge * len(a) * np.eye(a.shape[1])
  scores = {name: {} for name in tests}
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
  encoder, world: type[World], *, num_fit=4000, num_test=2000, seed=0
) -> dict:
  """Fits on training captions, tests on unseen ones.

  Returns:
    {'eval' | 'heldout': {aspect: accuracy}}; 'heldout' captions have
    combinations that are held out of training.
  """

  def take(split, number, heldout=False):
    scenes = world.scenes(seed, split, number, heldout=heldout)
    return features(encoder, scenes, world.nouns)

  return linear_readout(
    *take('train', num_fit),
    {
      'eval': take('eval', num_test),
      'heldout': take('eval', num_test, heldout=True),
    },
  )


def passes(scores, least=0.99):
  """Whether every aspect of `GATE` has at least this accuracy."""
  return all(
    s.get(aspect, 1) >= least for s in scores.values() for aspect in GATE
  )


def table(scores):
  """The accuracies in percent, one line per test set."""
  return '\n'.join(
    f'  {name:8}' + '  '.join(f'{a} {100 * v:.2f}' for a, v in score.items())
    for name, score in scores.items()
  )
