"""Accuracies and their confidence intervals."""

import concurrent.futures

import numpy as np
import pytest

from imagen_jax.evaluation import scores


def test_wilsons_interval_is_the_tabulated_one():
  # Tabulated intervals of 15 of 20 and of 0 of 10.
  np.testing.assert_allclose(scores.wilson(15, 20), (0.5313, 0.8881), atol=1e-4)
  np.testing.assert_allclose(scores.wilson(0, 10), (0, 0.2775), atol=1e-4)
  assert scores.wilson(10, 10)[1] == 1
  # The ends are the fractions p with |k/n - p| = 1.96 sqrt(p (1 - p) / n).
  for p in scores.wilson(7, 30):
    assert abs(7 / 30 - p) == pytest.approx(
      scores.Z95 * (p * (1 - p) / 30) ** 0.5
    )
  with pytest.raises(ValueError):
    scores.wilson(3, 2)


def test_an_accuracy_is_written_in_percent():
  assert scores.cell([True] * 15 + [False] * 5) == '75 % (53 to 89)'
  assert scores.cell(iter(())) == ''


def test_the_interval_of_a_mean_is_students():
  score = scores.mean([25.0, 35.0])
  # t of one degree of freedom is 12.706 at 97.5 %; the standard error is 5.
  assert score['ci95'] == pytest.approx([30 - 63.53, 30 + 63.53], abs=0.01)
  many = scores.mean(np.arange(1001.0))['ci95']
  assert many[1] - 500 == pytest.approx(1.962 * 289.11 / 1001**0.5, rel=1e-3)
  assert scores.mean([30.0]) == {'mean': 30.0, 'n': 1}  # nothing is known


def test_suites_that_end_at_once_lose_no_scores(tmp_path):
  def add(i):
    scores.add_scores(tmp_path, f's{i}', {'all': {'n': i}}, {'num': i})

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(add, range(40)))
  found = scores.read_scores(tmp_path)
  assert found['provenance'] == {f's{i}': {'num': i} for i in range(40)}
  assert [path.name for path in tmp_path.iterdir()] == [scores.FILE]
