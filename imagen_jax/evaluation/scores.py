"""Scores with their uncertainty, and the file they are kept in.

`scores.json` holds {suite: {category: {'accuracy', 'n', 'ci95'}}}, and under
`provenance` what each suite was measured on.
"""

import pathlib

import numpy as np

from imagen_jax.errors import DataError
from imagen_jax.io import files

FILE = 'scores.json'
Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(right, n):
  """Wilson's 95 % interval of a fraction: (low, high), each in [0, 1].

  Unlike the usual ±1.96 standard errors it stays inside [0, 1] and does not
  shrink to a point at 0 or n right (Wilson 1927).

  Raises:
    ValueError: n < 1, or `right` outside 0 … n.
  """
  if n < 1 or not 0 <= right <= n:
    raise ValueError(f'{right} right of {n}')
  fraction, zz = right / n, Z95 * Z95
  centre = (fraction + zz / (2 * n)) / (1 + zz / n)
  spread = fraction * (1 - fraction) / n + zz / (4 * n * n)
  half = Z95 / (1 + zz / n) * spread**0.5
  # Exactly 0 and 1 at the ends, where rounding leaves 1e-17 beside them.
  low = 0.0 if right == 0 else centre - half
  return low, 1.0 if right == n else centre + half


def fraction(verdicts):
  """{'accuracy', 'n', 'ci95'} of an iterable of booleans, at least one."""
  verdicts = list(verdicts)
  right, n = sum(map(bool, verdicts)), len(verdicts)
  return {'accuracy': right / n, 'n': n, 'ci95': list(wilson(right, n))}


def cell(verdicts):
  """The fraction as text, '85 % (77 to 91)'; '' where there are no verdicts."""
  verdicts = list(verdicts)
  if not verdicts:
    return ''
  found = fraction(verdicts)
  right, low, high = (100 * p for p in (found['accuracy'], *found['ci95']))
  return f'{right:.0f} % ({low:.0f} to {high:.0f})'


def mean(values):
  """{'mean', 'n', 'ci95'} of real numbers, by the normal approximation."""
  values = np.asarray(list(values), np.float64)
  half = 0.0
  if len(values) > 1:
    half = Z95 * values.std(ddof=1) / len(values) ** 0.5
  centre = float(values.mean())
  return {
    'mean': centre,
    'n': len(values),
    'ci95': [float(centre - half), float(centre + half)],
  }


def read_scores(folder):
  """A report folder's scores, {} where there are none.

  Raises:
    DataError: `scores.json` is no JSON of ours.
  """
  path = pathlib.Path(folder) / FILE
  if not path.exists():
    return {}
  advice = 'move it away and run again'
  scores = files.read_json(path, error=DataError, advice=advice)
  try:
    scores.get('provenance', {}).values()
  except AttributeError as error:
    raise DataError(f'{path} holds no scores; {advice}.') from error
  return scores


def add_scores(folder, suite, categories, provenance):
  """Puts one suite's scores into `scores.json`, leaving the others."""
  scores = read_scores(folder)
  notes = scores.pop('provenance', {})
  scores[suite] = categories
  scores['provenance'] = notes | {suite: provenance}
  files.write_json(pathlib.Path(folder) / FILE, scores)
  return scores
