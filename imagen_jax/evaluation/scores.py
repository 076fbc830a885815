"""Scores with confidence intervals, and the file that holds them.

`scores.json` holds {suite: {category: {'accuracy', 'n', 'ci95'}}}, and under
`provenance` what each suite was measured on. A score may have the accuracy on
true images besides, as 'judge'.
"""

import os
import pathlib
import typing
from collections.abc import Iterable

import numpy as np
from scipy.special import stdtrit

from imagen_jax.errors import DataError
from imagen_jax.io import files, lock

FILE = 'scores.json'
Z95 = 1.959963984540054  # the normal distribution's 97.5 % point

# {'accuracy', 'n', 'ci95'} for accuracies, else the suite's own keys.
Score = dict[str, typing.Any]
Categories = dict[str, Score]


def wilson(correct: int, n: int) -> tuple[float, float]:
  """Wilson's 95 % interval of a fraction: (low, high), each in [0, 1].

  Unlike the usual ±1.96 standard errors it stays inside [0, 1] and does not
  shrink to a point at 0 or n correct (Wilson 1927).

  Raises:
    ValueError: n < 1, or `correct` outside 0 … n.
  """
  if n < 1 or not 0 <= correct <= n:
    raise ValueError(f'{correct} correct of {n}')
  p, zz = correct / n, Z95 * Z95
  centre = (p + zz / (2 * n)) / (1 + zz / n)
  spread = p * (1 - p) / n + zz / (4 * n * n)
  half = Z95 / (1 + zz / n) * spread**0.5
  # Exactly 0 and 1 at the ends, where rounding is off by 1e-17.
  low = 0.0 if correct == 0 else centre - half
  return low, 1.0 if correct == n else centre + half


def accuracy(verdicts: Iterable[bool]) -> Score:
  """{'accuracy', 'n', 'ci95'} of at least one verdict."""
  verdicts = list(verdicts)
  correct, n = sum(map(bool, verdicts)), len(verdicts)
  return {'accuracy': correct / n, 'n': n, 'ci95': list(wilson(correct, n))}


def cell(verdicts: Iterable[bool]) -> str:
  """The accuracy as '85 % (77 to 91)'; '' without verdicts."""
  verdicts = list(verdicts)
  if not verdicts:
    return ''
  score = accuracy(verdicts)
  p, low, high = (100 * x for x in (score['accuracy'], *score['ci95']))
  return f'{p:.0f} % ({low:.0f} to {high:.0f})'


def mean(values: Iterable[float | np.floating]) -> Score:
  """{'mean', 'n', 'ci95'} of real numbers, by Student's t; of one no 'ci95'."""
  x = np.asarray(list(values), np.float64)
  n, centre = len(x), float(x.mean())
  if n == 1:
    return {'mean': centre, 'n': n}
  half = float(stdtrit(n - 1, 0.975) * x.std(ddof=1) / n**0.5)
  return {'mean': centre, 'n': n, 'ci95': [centre - half, centre + half]}


def read_scores(folder: str | os.PathLike) -> dict[str, typing.Any]:
  """A report folder's scores, {} if there are none.

  Raises:
    DataError: `scores.json` is not a file of scores.
  """
  path = pathlib.Path(folder) / FILE
  if not path.exists():
    return {}
  try:
    scores = files.parse_json(path.read_text(encoding='utf-8'))
    scores.get('provenance', {}).values()
  except (OSError, ValueError, AttributeError) as error:
    raise DataError(
      f'{path} holds no scores ({error}); move it away and run again.'
    ) from error
  return scores


def add_scores(
  folder: str | os.PathLike,
  suite: str,
  categories: Categories,
  provenance: dict[str, typing.Any],
) -> None:
  """Adds or replaces one suite's scores in `scores.json`."""
  # Another suite may be evaluated into the same folder.
  with lock.locked(folder, name=f'.{FILE}.lock', wait=True):
    scores = read_scores(folder)
    notes = scores.pop('provenance', {})
    scores[suite] = categories
    scores['provenance'] = notes | {suite: provenance}
    files.write_json(pathlib.Path(folder) / FILE, scores)
