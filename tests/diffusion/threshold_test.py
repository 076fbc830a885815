"""Thresholding of the predicted image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import threshold


def normal(seed, shape=(4, 8, 8, 3), scale=1.0):
  return scale * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
  'clip', [threshold.static_threshold, threshold.dynamic_threshold]
)
def test_thresholding_leaves_images_in_range_alone(clip):
  x = jnp.clip(normal(0), -1, 1)
  np.testing.assert_array_equal(clip(x), x)
  np.testing.assert_array_equal(jax.jit(clip)(x), x)


def test_static_threshold_clips():
  x = normal(0, scale=3.0)
  np.testing.assert_array_equal(
    threshold.static_threshold(x), np.clip(x, -1, 1)
  )


def test_dynamic_threshold_is_the_papers_per_sample():
  x = normal(0) * jnp.asarray([0.2, 1.0, 3.0, 50.0])[:, None, None, None]
  result = np.asarray(threshold.dynamic_threshold(x))
  for row in range(4):
    sample = np.asarray(x[row], np.float64)
    s = max(np.percentile(np.abs(sample), 99.5), 1.0)
    expected = np.clip(sample, -s, s) / s
    np.testing.assert_allclose(result[row], expected, rtol=1e-6)
  assert np.abs(result).max() == 1
  # The rest of the batch does not matter.
  alone = threshold.dynamic_threshold(x[2:3])
  np.testing.assert_array_equal(result[2:3], alone)


@pytest.mark.parametrize('fraction', [0.995, 0.95, 0, -1, 100.5])
def test_percentile_is_on_a_scale_of_a_hundred(fraction):
  with pytest.raises(ValueError):
    threshold.dynamic_threshold(normal(0), percentile=fraction)


EDGES = {
  'smooth': lambda: normal(3, (3, 17, 5, 3)),
  'ties': lambda: jnp.round(normal(4, (3, 16, 16, 3)) * 2) / 2,
  'constant': lambda: jnp.full((2, 9, 9, 1), -0.75),
  'zeros': lambda: jnp.zeros((2, 5, 5, 1)),
  'one': lambda: normal(5, (4, 1, 1, 1)),
  'two': lambda: normal(6, (4, 2, 1, 1)),
  'wide range': lambda: jnp.exp(normal(7, (3, 12, 12, 3), scale=20.0)),
  'one outlier': lambda: jnp.zeros((1, 20, 10, 1)).at[0, 3, 4, 0].set(1e30),
}


@pytest.mark.parametrize('case', EDGES)
def test_bisected_percentile_is_the_sorted_one(case):
  x = EDGES[case]()
  ours = jax.jit(threshold.magnitude_percentile, static_argnums=1)
  for percentile in (99.5, 50, 100):
    found = ours(x, percentile)
    # In float32 jnp.percentile also rounds the interpolation weight.
    with jax.enable_x64(True):
      expected = jnp.percentile(
        jnp.abs(x).reshape(len(x), -1).astype(jnp.float64), percentile, axis=1
      )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_bisected_percentile_is_exact_on_order_statistics():
  """The 99.5th percentile of 201 values is the 200th of them."""
  x = normal(8, (5, 201))
  expected = np.sort(np.abs(x), axis=1)[:, 199]
  found = threshold.magnitude_percentile(x, 99.5)
  np.testing.assert_allclose(found, expected, rtol=1e-7)
  assert (threshold.magnitude_percentile(x, 100) == np.abs(x).max(1)).all()


def test_bisected_percentile_is_exact_in_float64_and_at_full_size():
  with jax.enable_x64(True):
    x = jax.random.normal(jax.random.key(9), (2, 64, 64, 3), jnp.float64)
    expected = np.percentile(np.abs(x).reshape(2, -1), 99.5, axis=1)
    found = threshold.magnitude_percentile(x, 99.5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
  x = np.random.default_rng(0).standard_normal((1, 1024, 1024, 3), np.float32)
  expected = np.percentile(np.abs(x).astype(np.float64), 99.5)
  found = threshold.magnitude_percentile(jnp.asarray(x), 99.5)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
