"""Distances between image sets, against closed forms and naive loops."""

import numpy as np
import pytest

from imagen_jax.evaluation import distances


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def naive_kernel_mean(x, y, kernel, *, skip_equal=False):
  total, count = 0.0, 0
  for i, a in enumerate(x):
    for j, b in enumerate(y):
      if not (skip_equal and i == j):
        total, count = total + kernel(a, b), count + 1
  return total / count


def test_gaussians_with_one_covariance_differ_by_their_means(rng):
  half = rng.normal(size=(6, 6))
  cov, a, b = half @ half.T, rng.normal(size=6), rng.normal(size=6)
  assert distances.frechet(a, cov, b, cov) == pytest.approx(
    ((a - b) ** 2).sum(), rel=1e-9
  )


def test_gaussians_with_commuting_covariances_have_a_closed_form(rng):
  q, _ = np.linalg.qr(rng.normal(size=(8, 8)))
  a, b = rng.uniform(0.1, 4, 8), rng.uniform(0.1, 4, 8)
  found = distances.frechet(
    np.ones(8), (q * a) @ q.T, np.zeros(8), (q * b) @ q.T
  )
  expected = 8 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
  assert found == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_have_the_closed_form_too(rng):
  a = np.zeros((5, 5))
  a[0, 0] = 4
  b = np.zeros((5, 5))
  b[1, 1] = 9
  assert distances.frechet(np.zeros(5), a, np.zeros(5), b) == pytest.approx(13)
  few = rng.normal(size=(10, 50))  # fewer images than features
  m = distances.moments(few)
  assert distances.frechet(*m, *m) == pytest.approx(0, abs=1e-9)


def test_moments_are_the_unbiased_ones(rng):
  x = rng.normal(size=(9, 3)).astype(np.float32)
  mean, cov = distances.moments(x)
  centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
  np.testing.assert_allclose(mean, x.astype(np.float64).mean(0))
  np.testing.assert_allclose(cov, centred.T @ centred / 8, rtol=1e-12)
  assert mean.dtype == cov.dtype == np.float64
  with pytest.raises(ValueError):
    distances.moments(x[:1])


def test_frechet_of_samples_approaches_the_closed_form(rng):
  a = rng.normal(size=(40_000, 2)) * (1, 2)
  b = rng.normal(size=(40_000, 2)) * (3, 2) + (1, 0)
  found = distances.frechet(*distances.moments(a), *distances.moments(b))
  assert found == pytest.approx(1 + 4, rel=0.03)


def test_kid_is_the_unbiased_estimate_of_naive_loops(rng):
  a, b = rng.normal(size=(7, 4)), rng.normal(size=(7, 4)) + 1
  kernel = lambda x, y: (x @ y / 4 + 1) ** 3
  expected = (
    naive_kernel_mean(a, a, kernel, skip_equal=True)
    + naive_kernel_mean(b, b, kernel, skip_equal=True)
    - 2 * naive_kernel_mean(a, b, kernel)
  )
  mean, spread = distances.kid(a, b, subsets=3, size=1000)
  assert mean == pytest.approx(expected, rel=1e-9)
  assert spread == pytest.approx(0, abs=1e-9)


def test_kid_of_one_distribution_is_zero_on_average(rng):
  a, b = rng.normal(size=(2, 1000, 8))
  mean, spread = distances.kid(a, b, subsets=50, size=100)
  assert abs(mean) < 3 * spread / 50**0.5 + 0.01 and spread > 0
  far, _ = distances.kid(a, b + 1, subsets=5, size=100)
  assert far > 10 * abs(mean)


def test_cmmd_is_that_of_naive_loops_over_unit_vectors(rng):
  a, b = rng.normal(size=(9, 5)) + 1, rng.normal(size=(6, 5))
  u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
  kernel = lambda x, y: np.exp(-((x - y) ** 2).sum() / 200)
  expected = 1000 * (
    naive_kernel_mean(u, u, kernel)
    + naive_kernel_mean(v, v, kernel)
    - 2 * naive_kernel_mean(u, v, kernel)
  )
  assert distances.cmmd(a, b, block=4) == pytest.approx(expected, rel=1e-6)
  assert distances.cmmd(3 * a, a) == pytest.approx(0, abs=1e-10)


def test_precision_and_recall_are_those_of_naive_loops(rng):
  real = rng.normal(size=(30, 3))
  generated = 0.3 * rng.normal(size=(30, 3))

  def naive(points, centres, k):
    inside = 0
    for p in points:
      for c in centres:
        others = sorted(np.linalg.norm(centres - c, axis=1))
        if np.linalg.norm(p - c) <= others[k]:
          inside += 1
          break
    return inside / len(points)

  found = distances.precision_recall(real, generated, k=2, block=7)
  assert found == (naive(generated, real, 2), naive(real, generated, 2))
  # Generated features near the mean have high precision and low recall.
  assert found[0] > 0.9 > 0.6 > found[1]


def test_precision_and_recall_do_not_depend_on_the_order_of_the_images(rng):
  # Ten classes, far from each other; the real images are sorted by class.
  classes = rng.normal(size=(10, 4)) * 100
  real = classes.repeat(120, 0) + rng.normal(size=(1200, 4))
  generated = np.tile(classes, (30, 1)) + rng.normal(size=(300, 4))
  found = distances.precision_recall(real, generated, size=600)
  assert min(found) > 0.75
  shuffled = rng.permutation(real)
  again = distances.precision_recall(shuffled, generated, size=600)
  np.testing.assert_allclose(found, again, atol=0.1)


def test_precision_and_recall_compare_sets_of_equal_size(rng):
  real, generated = rng.normal(size=(1000, 6)), rng.normal(size=(29, 6))
  for value in distances.precision_recall(real, generated):
    assert value * 29 == pytest.approx(round(value * 29), abs=1e-9)


def test_the_clip_score_is_100_times_the_cosine():
  images = np.array([[3.0, 0], [0, 2.0], [1, 1]])
  texts = np.array([[5.0, 0], [0, -1.0], [1, 0]])
  found = distances.clip_scores(images, texts)
  np.testing.assert_allclose(found, [100, 0, 100 / 2**0.5])


@pytest.mark.parity
def test_frechet_equals_scipys_matrix_root_at_2048_dimensions(rng):
  linalg = pytest.importorskip('scipy.linalg')
  moments = []
  for scale in (1.0, 1.5):
    mix = np.random.default_rng(1).normal(size=(2048, 2048)) / 2048**0.5
    x = scale * rng.normal(size=(3000, 2048)) @ mix + 0.1 * scale
    moments.append(distances.moments(x))
  (m, c), (n, d) = moments
  root = linalg.sqrtm(c @ d)
  expected = ((m - n) ** 2).sum() + np.trace(c) + np.trace(d)
  expected -= 2 * np.trace(root).real
  found = distances.frechet(m, c, n, d)
  print(f'{found:.6f} here, {expected:.6f} with sqrtm')
  assert found == pytest.approx(expected, rel=1e-4)
