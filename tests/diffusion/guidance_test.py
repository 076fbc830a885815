"""Guidance, and its thresholding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import guidance, process
from imagen_jax.diffusion.guidance import GuidanceSpec
from imagen_jax.diffusion.threshold import THRESHOLDS, dynamic_threshold

SHAPE = (4, 8, 8, 3)


def normal(seed, shape=SHAPE, scale=1.0):
  return scale * jax.random.normal(jax.random.key(seed), shape)


def guided(network, weight=None, *, prediction='eps', **spec):
  """`guidance.guided` of one weight, as denoise(z, logsnr) -> x."""
  denoise = guidance.guided(
    network,
    weights=() if weight is None else (weight,),
    prediction=prediction,
    spec=GuidanceSpec(**spec),
  )
  return lambda z, logsnr: denoise(z, logsnr, ())[0]


def network(z, logsnr, branch):
  """Two different branches; 'all' returns the pair."""
  cond, uncond = jnp.tanh(z) * 0.9, jnp.sin(z) * 0.4
  return (cond, uncond) if branch == 'all' else cond


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
  denoise = guided(conditional_only)
  assert denoise(normal(0), jnp.zeros(4)).shape == SHAPE


def test_guidance_weight_one_is_the_conditional_model():
  cond, uncond = normal(0), normal(1, scale=100.0)
  for run in (guidance.guide, jax.jit(guidance.guide)):
    assert (run(cond, uncond, 1.0) == cond).all()
    assert (run(cond, uncond, jnp.ones(4)) == cond).all()
  z, logsnr = normal(0), jnp.zeros(4)
  alone = jax.jit(guided(network))(z, logsnr)
  traced = jax.jit(lambda w: guided(network, weight=w)(z, logsnr))
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
      return tuple(convert(eps) for eps in network(z, logsnr, 'all'))

    return guided(network_, weight=7.0, prediction=prediction, threshold=None)(
      z, logsnr
    )

  np.testing.assert_allclose(
    answering(prediction), answering('eps'), rtol=1e-4, atol=1e-4
  )


# The guidance interval.


def test_guidance_interval_is_guided_inside_and_conditional_outside():
  z = normal(0)
  options = dict(weight=5.0, threshold=None)
  limited = guided(network, guidance_interval=(-2.0, 3.0), **options)
  everywhere = guided(network, **options)
  nowhere = guided(network, threshold=None)
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

  denoise = jax.jit(guided(counted, weight=5.0, guidance_interval=(-2.0, 3.0)))
  for logsnr in (-9.0, 0.0, 9.0):
    jax.block_until_ready(denoise(normal(0), jnp.full((4,), logsnr)))
  jax.effects_barrier()
  assert runs == ['cond', 'all', 'cond']


# The two together.


def test_threshold_is_applied_to_the_guided_image():
  z, logsnr = normal(0, scale=2.0), jnp.full((4,), -4.0)
  options = dict(weight=5.0, prediction='v')
  raw = guided(network, threshold=None, **options)(z, logsnr)
  assert np.abs(raw).max() > 1
  np.testing.assert_allclose(
    guided(network, **options)(z, logsnr),
    dynamic_threshold(raw),
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    guided(network, threshold='static', **options)(z, logsnr),
    np.clip(raw, -1, 1),
    rtol=1e-6,
  )
  with pytest.raises(ValueError):
    guided(network, threshold='clip')


def test_bfloat16_branches_are_guided_in_float32():
  low = lambda *a: jax.tree.map(lambda y: y.astype(jnp.bfloat16), network(*a))
  z, logsnr = normal(0), jnp.zeros(4)
  options = dict(weight=5.0, prediction='x', threshold=None)
  x = guided(low, **options)(z, logsnr)
  cond, uncond = (y.astype(jnp.float32) for y in low(z, logsnr, 'all'))
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x, 5 * cond - 4 * uncond, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('threshold', THRESHOLDS)
def test_no_threshold_turns_infinity_into_a_colour(threshold):
  values = jnp.array([0.5, jnp.inf, -jnp.inf, jnp.nan]).reshape(4, 1, 1, 1)
  denoise = guided(
    lambda z, logsnr, branch: values, prediction='x', threshold=threshold
  )
  x = denoise(jnp.zeros_like(values), jnp.zeros(4))[:, 0, 0, 0]
  np.testing.assert_array_equal(x, [0.5, np.nan, np.nan, np.nan])


# Other branches, and what is done to the difference.


def three(z, logsnr, branch):
  """A conditional, an unconditional and a weaker model's output."""
  cond, uncond = network(z, logsnr, 'all')
  return (cond, uncond, jnp.cos(z)) if branch == 'all' else cond


def test_autoguidance_and_classifier_free_guidance_add_up():
  z, logsnr = normal(0), jnp.zeros(4)
  cond, uncond, weak = three(z, logsnr, 'all')
  denoise = guidance.guided(
    three,
    weights=(3.0, 1.5),
    prediction='x',
    spec=GuidanceSpec(threshold=None),
  )
  expected = cond + 2 * (cond - uncond) + 0.5 * (cond - weak)
  np.testing.assert_allclose(denoise(z, logsnr, ())[0], expected, rtol=1e-5)
  # Autoguidance alone: D_weak + w (D − D_weak).
  alone = guided(
    lambda *a: three(*a)[::2] if a[2] == 'all' else three(*a),
    4.0,
    prediction='x',
    threshold=None,
  )
  expected = weak + 4 * (cond - weak)
  np.testing.assert_allclose(alone(z, logsnr), expected, rtol=1e-5, atol=1e-6)


def test_a_guidance_schedule_is_linear_in_the_noise_angle():
  # tan(π/8)² is a quarter of the way: alpha = cos(π/8), sigma = sin(π/8).
  quarter = 2 * np.log(np.tan(np.pi / 8))
  logsnr = jnp.asarray([-60.0, quarter, 0.0, -quarter, 60.0])
  close = functools.partial(np.testing.assert_allclose, atol=1e-6)
  close(guidance.ramp(logsnr, (0.0, 1.0)), [0, 0.25, 0.5, 0.75, 1])
  close(guidance.ramp(logsnr, (1.0, 0.0)), [1, 0.75, 0.5, 0.25, 0])
  close(guidance.ramp(logsnr, (0.0, 2.0, 0.0)), [0, 1, 2, 1, 0])


def test_the_scheduled_weight_runs_from_none_to_the_whole():
  z = normal(0)
  ramped = guided(network, 5.0, threshold=None, guidance_schedule=(0.0, 1.0))
  for logsnr, w in ((-60.0, 1.0), (0.0, 3.0), (60.0, 5.0)):
    full = jnp.full((4,), logsnr)
    plain = guided(network, w, threshold=None)
    np.testing.assert_allclose(ramped(z, full), plain(z, full), rtol=1e-4)


def test_rescaled_guidance_has_the_contrast_of_the_conditional_prediction():
  z, logsnr = normal(0), jnp.zeros(4)
  cond, uncond = network(z, logsnr, 'all')
  plain = 7 * cond - 6 * uncond
  std = lambda x: np.std(np.asarray(x), axis=(1, 2, 3), keepdims=True)
  for phi in (1.0, 0.7):
    x = guided(
      network, 7.0, prediction='x', threshold=None, guidance_rescale=phi
    )(z, logsnr)
    whole = plain * std(cond) / std(plain)
    np.testing.assert_allclose(
      x, phi * whole + (1 - phi) * plain, rtol=1e-4, atol=1e-5
    )


def test_projected_guidance_is_orthogonal_to_the_image_and_bounded():
  delta, x = normal(0), normal(1)
  dot = lambda a, b: np.sum(np.asarray(a, np.float64) * b, axis=(1, 2, 3))
  across, _ = guidance.apg(delta, x, GuidanceSpec(apg_eta=0.0))
  np.testing.assert_allclose(dot(across, x), 0, atol=1e-4)
  parallel = (dot(delta, x) / dot(x, x))[:, None, None, None] * np.asarray(x)
  np.testing.assert_allclose(delta - across, parallel, rtol=1e-3, atol=1e-5)
  half, _ = guidance.apg(delta, x, GuidanceSpec(apg_eta=0.5))
  np.testing.assert_allclose(half, across + 0.5 * parallel, atol=1e-5)
  norms = np.sqrt(dot(delta, delta))
  limit = float(np.sort(norms)[1:3].mean())  # two images are beyond it
  short, _ = guidance.apg(delta, x, GuidanceSpec(apg_norm=limit))
  np.testing.assert_allclose(
    np.sqrt(dot(short, short)), np.minimum(norms, limit), rtol=1e-5
  )


@pytest.mark.parametrize('option', ['apg_eta', 'guidance_rescale'])
def test_an_image_without_content_stays_finite(option):
  zero = lambda z, logsnr, branch: (0 * z, 0 * z) if branch == 'all' else 0 * z
  x = guided(zero, 3.0, prediction='x', **{option: 0.5})(
    normal(0), jnp.zeros(4)
  )
  assert (x == 0).all()


def test_momentum_is_a_sum_over_the_steps():
  """Δ₂ + β Δ₁ for each branch; the first step has no past."""
  spec = GuidanceSpec(threshold=None, apg_momentum=-0.5)
  denoise = guidance.guided(
    three, weights=(3.0, 2.0), prediction='x', spec=spec
  )
  logsnr, first, second = jnp.zeros(4), normal(0), normal(1)
  _, memory = denoise(first, logsnr, spec.memory(first, 2))
  x, _ = denoise(second, logsnr, memory)
  (cond, *others), (before, *old) = (
    three(z, logsnr, 'all') for z in (second, first)
  )
  deltas = [
    cond - other - 0.5 * (before - last) for other, last in zip(others, old)
  ]
  expected = cond + 2 * deltas[0] + deltas[1]
  np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_neutral_options_are_plain_guidance():
  spec = GuidanceSpec()
  assert not spec.projects and spec.memory(normal(0), 2) == ()
  x, memory = guidance.apg(normal(0), normal(1), spec)
  np.testing.assert_array_equal(x, normal(0))
  assert memory == ()
