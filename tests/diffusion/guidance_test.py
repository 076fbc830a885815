"""Guidance and thresholding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import guidance, process

SHAPE = (4, 8, 8, 3)


def normal(seed, shape=SHAPE, scale=1.0):
  return scale * jax.random.normal(jax.random.key(seed), shape)


def network(z, logsnr, branch):
  """Two different branches; 'both' returns the pair."""
  cond, uncond = jnp.tanh(z) * 0.9, jnp.sin(z) * 0.4
  return (cond, uncond) if branch == 'both' else cond


def conditional_only(z, logsnr, branch):
  assert branch == 'cond', 'the unconditional branch was computed'
  return network(z, logsnr, branch)


# Guidance.


def test_guide_is_the_papers_formula_with_one_weight_per_sample():
  cond, uncond = normal(0), normal(1)
  weight = jnp.asarray([1.0, 0.0, 5.0, 1.35])
  result = guidance.guide(cond, uncond, weight)
  for row, w in enumerate(weight):
    expected = w * cond[row] + (1 - w) * uncond[row]
    np.testing.assert_allclose(result[row], expected, rtol=1e-6)


def test_without_a_weight_there_is_one_branch():
  denoise = guidance.guided(conditional_only)
  assert denoise(normal(0), jnp.zeros(4)).shape == SHAPE


def test_guidance_weight_one_is_the_conditional_model():
  cond, uncond = normal(0), normal(1, scale=100.0)
  for run in (guidance.guide, jax.jit(guidance.guide)):
    assert (run(cond, uncond, 1.0) == cond).all()
    assert (run(cond, uncond, jnp.ones(4)) == cond).all()
  z, logsnr = normal(0), jnp.zeros(4)
  alone = jax.jit(guidance.guided(network))(z, logsnr)
  traced = jax.jit(lambda w: guidance.guided(network, weight=w)(z, logsnr))
  close = dict(rtol=1e-5, atol=1e-6)  # other fusions round differently
  np.testing.assert_allclose(traced(jnp.float32(1)), alone, **close)
  assert not np.allclose(traced(jnp.float32(2)), alone, **close)


@pytest.mark.parametrize('prediction', ['v', 'x'])
def test_guiding_eps_is_guiding_any_other_prediction(prediction):
  z, logsnr = normal(0), jnp.asarray([-3.0, -1.0, 0.0, 2.0])

  def answering(prediction):
    def convert(eps):
      x = process.x_from_eps(z, eps, logsnr)
      return process.target(prediction, x, eps, logsnr)

    def network_(z, logsnr, branch):
      return tuple(convert(eps) for eps in network(z, logsnr, 'both'))

    return guidance.guided(
      network_, weight=7.0, prediction=prediction, threshold=None
    )(z, logsnr)

  np.testing.assert_allclose(
    answering(prediction), answering('eps'), rtol=1e-4, atol=1e-4
  )


# The guidance interval.


def test_guidance_interval_is_guided_inside_and_conditional_outside():
  z = normal(0)
  options = dict(weight=5.0, threshold=None)
  limited = guidance.guided(network, interval=(-2.0, 3.0), **options)
  everywhere = guidance.guided(network, **options)
  nowhere = guidance.guided(network, threshold=None)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  for logsnr in (-2.0, 0.0, 3.0):
    full = jnp.full((4,), logsnr)
    close(limited(z, full), everywhere(z, full))
  for logsnr in (-2.1, 3.1):
    full = jnp.full((4,), logsnr)
    close(limited(z, full), nowhere(z, full))
  mixed = jnp.asarray([-5.0, 0.0, 2.0, 9.0])
  rows = limited(z, mixed)
  close(rows[1:3], everywhere(z, mixed)[1:3])
  close(rows[::3], nowhere(z, mixed)[::3])


def test_outside_the_interval_the_second_branch_is_never_run():
  runs = []

  def counted(z, logsnr, branch):
    jax.debug.callback(lambda: runs.append(branch))
    return network(z, logsnr, branch)

  denoise = jax.jit(guidance.guided(counted, weight=5.0, interval=(-2.0, 3.0)))
  for logsnr in (-9.0, 0.0, 9.0):
    jax.block_until_ready(denoise(normal(0), jnp.full((4,), logsnr)))
  jax.effects_barrier()
  assert runs == ['cond', 'both', 'cond']


# Thresholding.


@pytest.mark.parametrize(
  'threshold', [guidance.static_threshold, guidance.dynamic_threshold]
)
def test_thresholding_leaves_images_in_range_alone(threshold):
  x = jnp.clip(normal(0), -1, 1)
  np.testing.assert_array_equal(threshold(x), x)
  np.testing.assert_array_equal(jax.jit(threshold)(x), x)


def test_static_threshold_clips():
  x = normal(0, scale=3.0)
  np.testing.assert_array_equal(guidance.static_threshold(x), np.clip(x, -1, 1))


def test_dynamic_threshold_is_the_papers_per_sample():
  x = normal(0) * jnp.asarray([0.2, 1.0, 3.0, 50.0])[:, None, None, None]
  result = np.asarray(guidance.dynamic_threshold(x))
  for row in range(4):
    sample = np.asarray(x[row], np.float64)
    s = max(np.percentile(np.abs(sample), 99.5), 1.0)
    expected = np.clip(sample, -s, s) / s
    np.testing.assert_allclose(result[row], expected, rtol=1e-6)
  assert np.abs(result).max() == 1
  # The rest of the batch does not matter.
  alone = guidance.dynamic_threshold(x[2:3])
  np.testing.assert_array_equal(result[2:3], alone)


@pytest.mark.parametrize('fraction', [0.995, 0.95, 0, -1, 100.5])
def test_percentile_is_on_a_scale_of_a_hundred(fraction):
  with pytest.raises(ValueError):
    guidance.dynamic_threshold(normal(0), percentile=fraction)


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
  ours = jax.jit(guidance.magnitude_percentile, static_argnums=1)
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
  found = guidance.magnitude_percentile(x, 99.5)
  np.testing.assert_allclose(found, expected, rtol=1e-7)
  assert (guidance.magnitude_percentile(x, 100) == np.abs(x).max(1)).all()


def test_bisected_percentile_is_exact_in_float64_and_at_full_size():
  with jax.enable_x64(True):
    x = jax.random.normal(jax.random.key(9), (2, 64, 64, 3), jnp.float64)
    expected = np.percentile(np.abs(x).reshape(2, -1), 99.5, axis=1)
    found = guidance.magnitude_percentile(x, 99.5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
  x = np.random.default_rng(0).standard_normal((1, 1024, 1024, 3), np.float32)
  expected = np.percentile(np.abs(x).astype(np.float64), 99.5)
  found = guidance.magnitude_percentile(jnp.asarray(x), 99.5)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


# The two together.


def test_threshold_is_applied_to_the_guided_image():
  z, logsnr = normal(0, scale=2.0), jnp.full((4,), -4.0)
  options = dict(weight=5.0, prediction='v')
  raw = guidance.guided(network, threshold=None, **options)(z, logsnr)
  assert np.abs(raw).max() > 1
  np.testing.assert_allclose(
    guidance.guided(network, **options)(z, logsnr),
    guidance.dynamic_threshold(raw),
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    guidance.guided(network, threshold='static', **options)(z, logsnr),
    np.clip(raw, -1, 1),
    rtol=1e-6,
  )
  with pytest.raises(ValueError):
    guidance.guided(network, threshold='clip')


def test_bfloat16_branches_are_guided_in_float32():
  low = lambda *a: jax.tree.map(lambda y: y.astype(jnp.bfloat16), network(*a))
  z, logsnr = normal(0), jnp.zeros(4)
  options = dict(weight=5.0, prediction='x', threshold=None)
  x = guidance.guided(low, **options)(z, logsnr)
  cond, uncond = (y.astype(jnp.float32) for y in low(z, logsnr, 'both'))
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x, 5 * cond - 4 * uncond, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('threshold', guidance.THRESHOLDS)
def test_no_threshold_turns_infinity_into_a_colour(threshold):
  values = jnp.array([0.5, jnp.inf, -jnp.inf, jnp.nan]).reshape(4, 1, 1, 1)
  denoise = guidance.guided(
    lambda z, logsnr, branch: values, prediction='x', threshold=threshold
  )
  x = denoise(jnp.zeros_like(values), jnp.zeros(4))[:, 0, 0, 0]
  np.testing.assert_array_equal(x, [0.5, np.nan, np.nan, np.nan])
