"""The samplers on data whose optimal denoiser is known.

For pixels x ~ N(mu, s²) the optimal denoiser is affine,

  E[x | z] = mu + s² alpha / (alpha² s² + sigma²) (z − alpha mu),

and the probability-flow ODE keeps (z − alpha mu) / sqrt(alpha² s² + sigma²)
constant, so the image of a given noise is known exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import process, reverse, samplers
from imagen_jax.diffusion.process import over
from imagen_jax.diffusion.samplers import SAMPLERS, SamplerSpec, Step
from imagen_jax.diffusion.schedule import alpha_sigma, cosine_logsnr
from imagen_jax.diffusion.settings import SettingError
from imagen_jax.diffusion.threshold import static_threshold

MU, S = 0.3, 2.0
SHAPE = (2, 2, 3)


def gaussian_denoise(z, logsnr, *, mu=MU, s=S):
  alpha, sigma = alpha_sigma(over(z, logsnr))
  gain = s**2 * alpha / (alpha**2 * s**2 + sigma**2)
  return mu + gain * (z - alpha * mu)


def gaussian_flow(z, logsnr, *, mu=MU, s=S):
  """The image at the end of the probability-flow ODE from z, in closed form."""
  alpha, sigma = alpha_sigma(logsnr)
  return mu + s * (z - alpha * mu) / jnp.sqrt(alpha**2 * s**2 + sigma**2)


def keys(num, seed=0):
  return jax.random.split(jax.random.key(seed), num)


def stateless(denoise):
  """(z, logsnr) -> x as a denoiser that remembers nothing."""
  return lambda z, logsnr, memory: (denoise(z, logsnr), memory)


def sampled(
  keys, denoise, *, z=None, start=1.0, inpaint=None, seen=False, **options
):
  """`reverse.sample`, or `trajectory` if `seen`, with a spec of `options`."""
  spec = SamplerSpec(**{'sampler': 'ddpm', 'gamma': 0.0} | options)
  if z is None:
    shape = SHAPE if inpaint is None else inpaint.known.shape[1:]
    z = reverse.initial_noise(keys, shape)
  logsnr = reverse.logsnr_grid(cosine_logsnr, spec, start=start, dtype=z.dtype)
  run = reverse.trajectory if seen else reverse.sample
  start = reverse.Reverse(keys, z, logsnr, stateless(denoise), spec, inpaint)
  return run(start)


@functools.partial(jax.jit, static_argnames=('steps', 'options'))
def run(keys, z=None, *, steps, options=()):
  return sampled(keys, gaussian_denoise, z=z, steps=steps, **dict(options))


def trajectory(denoise, num=2, **options):
  return jax.jit(lambda keys: sampled(keys, denoise, seen=True, **options))(
    keys(num)
  )


# Accuracy.


@functools.partial(jax.jit, static_argnames='sampler')
def flow_error(z, logsnr, *, sampler):
  """The error of the images against the closed form, of any grid."""
  spec = SamplerSpec(sampler=sampler, gamma=0.0)
  denoise = stateless(gaussian_denoise)
  images = reverse.sample(
    reverse.Reverse(keys(len(z)), z, logsnr, denoise, spec)
  )
  exact = gaussian_flow(z, logsnr[0])
  return jnp.sqrt(jnp.mean((images - exact) ** 2))


def flow_errors(sampler, grid, all_steps):
  with jax.enable_x64(True):
    z = jax.random.normal(jax.random.key(1), (64, 1, 1, 1), jnp.float64)
    errors = []
    for steps in all_steps:
      spec = SamplerSpec(grid=grid, steps=steps)
      logsnr = reverse.logsnr_grid(cosine_logsnr, spec, dtype=jnp.float64)
      errors.append(float(flow_error(z, logsnr, sampler=sampler)))
    return errors


@pytest.mark.parametrize(
  'sampler, low, high',
  [('unipc', 2.8, 3.2), ('dpmpp', 1.8, 2.3), ('ddim', 0.85, 1.15)],
)
def test_the_order_of_the_deterministic_solvers_is_the_published_one(
  sampler, low, high
):
  """The error against the exact flow decreases as steps^−3, −2 and −1."""
  steps = [64, 128, 256]
  errors = flow_errors(sampler, 'logsnr', steps)
  order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert low < order < high, (order, errors)
  assert errors[-1] < {'unipc': 1e-4, 'dpmpp': 1e-3, 'ddim': 5e-2}[sampler]


def test_unipc_has_less_error_than_its_predictor_at_every_number_of_steps():
  steps = [5, 8, 12, 16, 32]
  ours, predictor = (flow_errors(s, 'time', steps) for s in ('unipc', 'dpmpp'))
  assert (np.divide(ours, predictor) < 0.45).all(), (ours, predictor)


@pytest.mark.parametrize('sampler', ['unipc', 'dpmpp', 'ddim'])
def test_error_falls_on_the_time_uniform_grid(sampler):
  errors = flow_errors(sampler, 'time', [16, 32, 64, 128, 256])
  ratios = np.divide(errors[:-1], errors[1:])
  least = {'unipc': 2.9, 'dpmpp': 2.7, 'ddim': 1.8}[sampler]
  assert (ratios > least).all(), errors


@functools.partial(jax.jit, static_argnames=('sampler', 'options'))
def affine(before, now, then, *, sampler, options):
  """(z_s, x) without z, x_last, and noise; what a unit of each adds to them."""
  step = functools.partial(SAMPLERS[sampler].step, **dict(options))

  def probe(z, x_last, noise):
    x = gaussian_denoise(z, now)
    last = x_last, before
    return jnp.stack([step(z, x, noise, Step(now, then, last)), x])

  shift = probe(*jnp.zeros(3))
  return shift, [probe(*row) - shift for row in jnp.eye(3)]


def moments(sampler, steps, options):
  """Mean and standard deviation of the images, without sampling.

  Each step is affine in (z, x_last, noise), so four probes give its
  coefficients.
  """
  with jax.enable_x64(True):
    logsnr = np.asarray(cosine_logsnr(jnp.linspace(1.0, 0.0, steps + 1)))
    mean, cov = np.zeros(2), np.diag([1.0, 0.0])
    befores = [-np.inf, *logsnr[:-3]]
    for at in zip(befores, logsnr[:-2], logsnr[1:-1]):
      shift, (on_z, on_x, on_noise) = affine(
        *at, sampler=sampler, options=options
      )
      matrix = np.stack([on_z, on_x], axis=1)
      mean = matrix @ mean + shift
      cov = matrix @ cov @ matrix.T + np.outer(on_noise, on_noise)
    x = gaussian_denoise(mean[0], logsnr[-2])
    gain = gaussian_denoise(mean[0] + 1, logsnr[-2]) - x
    return float(x), float(gain * np.sqrt(cov[0, 0]))


@pytest.mark.parametrize(
  'sampler, options, least, most',
  [
    ('ddpm', {'gamma': 0.0}, 1.8, 0.04),
    ('ddpm', {'gamma': 0.3}, 1.8, 0.04),
    ('ddpm', {'gamma': 1.0}, 1.8, 0.04),
    ('dpmpp_sde', {}, 2.4, 1e-3),
  ],
)
def test_moments_of_the_stochastic_samplers_converge_to_the_datas(
  sampler, options, least, most
):
  options = tuple(options.items())
  results = [moments(sampler, steps, options) for steps in (32, 64, 128)]
  # For any number of steps the only error of the mean is the start, N(0, 1).
  np.testing.assert_allclose([m for m, _ in results], MU, atol=1e-6)
  errors = np.abs([s - S for _, s in results])
  assert errors[-1] < most
  assert (errors[:-1] / errors[1:] > least).all(), errors


def test_ddpm_images_have_the_datas_mean_and_deviation():
  images = run(keys(4096), steps=128, options=(('gamma', 0.3),))
  num = images.size
  assert float(images.mean()) == pytest.approx(MU, abs=5 * S / num**0.5)
  assert float(images.std()) == pytest.approx(S, abs=0.02 + 5 / num**0.5)
  # All 12 numbers of an image, and all images, are independent.
  flat = np.asarray(images).reshape(4096, -1)
  correlation = np.corrcoef(flat.T) - np.eye(12)
  assert np.abs(correlation).max() < 5 / 64


# Steps against one another.


def step_inputs():
  samples = jax.random.normal(jax.random.key(2), (3, 4, *SHAPE), jnp.float64)
  return tuple(samples)


@pytest.mark.parametrize('pair', [(-15.0, -5.0), (-1.0, -0.5), (2.0, 9.0)])
def test_ddim_with_eta_one_is_the_ancestral_step(pair):
  with jax.enable_x64(True):
    at = Step(*map(jnp.float64, pair))
    ddim = samplers.ddim_step(*step_inputs(), at, eta=1.0)
    ddpm = samplers.ddpm_step(*step_inputs(), at, gamma=0.0)
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-8, atol=1e-10)


def test_eta_scales_the_fresh_noise_and_keeps_the_marginal():
  with jax.enable_x64(True):
    now, then, eta = jnp.float64(-1), jnp.float64(1), 0.5
    step = lambda z, noise: float(
      samplers.ddim_step(jnp.float64(z), 0.0, noise, Step(now, then), eta=eta)
    )
    _, variance = process.posterior(
      jnp.zeros((1,)), 0.0, logsnr_t=now, logsnr_s=then
    )
    (_, sigma_t), (_, sigma_s) = alpha_sigma(now), alpha_sigma(then)
    fresh, kept = step(0.0, 1.0), step(sigma_t, 0.0)
    np.testing.assert_allclose(fresh, eta * jnp.sqrt(variance)[()], rtol=1e-9)
    np.testing.assert_allclose(fresh**2 + kept**2, sigma_s**2, rtol=1e-9)


def test_first_step_of_the_multistep_solver_is_ddim():
  with jax.enable_x64(True):
    z, x, noise = step_inputs()
    past = jnp.zeros_like(x), jnp.float64(-jnp.inf)
    at = Step(jnp.float64(-3), jnp.float64(-2), past)
    for step, eta in (
      (samplers.dpmpp_step, 0.0),
      (SAMPLERS['dpmpp_sde'].step, 1.0),
      (lambda *a: samplers.unipc_step(*a[:3], a[3]._replace(before=past)), 0.0),
    ):
      np.testing.assert_allclose(
        step(z, x, noise, at),
        samplers.ddim_step(z, x, noise, at, eta=eta),
        rtol=1e-12,
      )


def test_the_sde_solver_keeps_the_marginal_of_a_known_image():
  """With x known, z_t ~ N(alpha_t x, sigma_t²) becomes z_s ~ q(z_s | x)."""
  with jax.enable_x64(True):
    x, now, then = 0.6, jnp.float64(-1), jnp.float64(2)
    known = jnp.float64(x), jnp.float64(-3)
    step = lambda z, noise: float(
      SAMPLERS['dpmpp_sde'].step(
        jnp.float64(z), jnp.float64(x), noise, Step(now, then, known)
      )
    )
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(alpha_sigma, (now, then))
    mean = step(alpha_t * x, 0.0)
    kept = step(alpha_t * x + sigma_t, 0.0) - mean
    fresh = step(alpha_t * x, 1.0) - mean
    np.testing.assert_allclose(mean, alpha_s * x, rtol=1e-9)
    np.testing.assert_allclose(kept**2 + fresh**2, sigma_s**2, rtol=1e-9)
    np.testing.assert_allclose(fresh**2 / sigma_s**2, 1 - np.exp(-3), rtol=1e-9)


def test_multistep_solver_is_exact_to_second_order_in_the_prediction():
  """For x linear in the half log-SNR the error of a step is O(h³)."""
  with jax.enable_x64(True):

    def error(h):
      now = jnp.float64(0.5)
      z, x = jnp.float64(0.7), lambda lam: 0.2 + 0.3 * (lam - now)
      at = Step(2 * now, 2 * (now + h), (x(now - h), 2 * (now - h)))
      step = samplers.dpmpp_step(z, x(now), 0.0, at)
      # d(z / sigma) = e^λ x(λ) dλ, in closed form.
      _, sigma_t = alpha_sigma(2 * now)
      _, sigma_s = alpha_sigma(2 * (now + h))
      primitive = lambda lam: jnp.exp(lam) * (x(lam) - 0.3)
      exact = sigma_s * (z / sigma_t + primitive(now + h) - primitive(now))
      return abs(float(step - exact))

    assert error(0.1) / error(0.05) == pytest.approx(8, rel=0.1)


# The loop.


@pytest.mark.parametrize('grid', ['time', 'logsnr'])
def test_the_network_sees_every_point_but_the_last(grid):
  """From pure noise towards the data, each point exactly once."""
  echo = lambda z, logsnr: jnp.zeros_like(z) + over(z, logsnr)
  path = trajectory(echo, steps=5, grid=grid)
  times = jnp.linspace(1, 0, 6)
  expected = (
    cosine_logsnr(times) if grid == 'time' else jnp.linspace(-15, 15, 6)
  )
  np.testing.assert_allclose(path.logsnr, expected[:-1], rtol=1e-3, atol=1e-4)
  for i in range(5):
    assert (path.x[i] == path.logsnr[i]).all()


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_the_last_step_returns_the_prediction_itself(sampler):
  path = trajectory(gaussian_denoise, steps=4, sampler=sampler)
  images = run(keys(2), steps=4, options=(('sampler', sampler),))
  np.testing.assert_array_equal(images, path.x[-1])
  expected = gaussian_denoise(path.z[-1], path.logsnr[-1])
  np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_one_step_is_one_denoising(sampler):
  z = jax.random.normal(jax.random.key(3), (2, *SHAPE))
  found = run(keys(2), z, steps=1, options=(('sampler', sampler),))
  np.testing.assert_allclose(found, gaussian_denoise(z, -15.0), rtol=1e-3)


def test_ddim_derives_eps_anew_from_a_thresholded_image():
  denoise = lambda z, logsnr: static_threshold(gaussian_denoise(z, logsnr))
  path = trajectory(denoise, steps=4, sampler='ddim')
  assert np.abs(path.x).max() == 1, 'nothing was clipped'
  alpha, sigma = (np.asarray(a) for a in alpha_sigma(path.logsnr))
  for i in range(3):
    z, x = path.z[i], path.x[i]
    eps = (z - alpha[i] * x) / sigma[i]
    np.testing.assert_allclose(
      path.z[i + 1],
      alpha[i + 1] * x + sigma[i + 1] * eps,
      rtol=1e-4,
      atol=1e-4,
    )


def test_noise_is_fresh_at_every_step_and_standard():
  """With x = 0 each step's deviation from the mean is its noise alone."""
  path = trajectory(lambda z, logsnr: 0 * z, num=512, steps=4)
  noises = [path.z[0]]
  for i in range(3):
    mean, variance = process.posterior(
      path.z[i],
      0 * path.z[i],
      logsnr_t=path.logsnr[i],
      logsnr_s=path.logsnr[i + 1],
    )
    noises.append((path.z[i + 1] - mean) / jnp.sqrt(variance))
  flat = np.stack([np.ravel(noise) for noise in noises])
  np.testing.assert_allclose(flat.std(axis=1), 1, atol=0.05)
  assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.06


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(sampler):
  options = (('sampler', sampler),)
  batch = run(keys(4), steps=3, options=options)
  swapped = run(keys(4)[::-1], steps=3, options=options)
  np.testing.assert_array_equal(batch, swapped[::-1])
  alone = run(keys(4)[2:3], steps=3, options=options)
  np.testing.assert_allclose(batch[2:3], alone, rtol=1e-6, atol=1e-6)
  assert (batch[0] != batch[1]).any()


def test_eta_and_gamma_reach_the_steps():
  images = [
    run(keys(1), steps=4, options=tuple(options.items()))
    for options in (
      dict(sampler='ddim'),
      dict(sampler='ddim', eta=1.0),
      dict(sampler='ddpm', gamma=0.0),
      dict(sampler='ddpm', gamma=1.0),
    )
  ]
  np.testing.assert_allclose(images[1], images[2], rtol=1e-3, atol=1e-4)
  assert (images[0] != images[1]).any()
  assert (images[2] != images[3]).any()


def test_sampling_can_start_from_a_noisy_image():
  """A start from z at t = 0.4 ends at the closed-form flow's image."""
  start = 0.4
  logsnr = cosine_logsnr(jnp.float32(start))
  image = jnp.full((2, *SHAPE), 0.8)
  z = process.diffuse(
    image, jax.random.normal(jax.random.key(4), z_shape(2)), logsnr
  )
  path = jax.jit(
    lambda z: sampled(
      keys(2),
      gaussian_denoise,
      steps=160,  # 64 of them
      sampler='dpmpp',
      z=z,
      start=start,
      seen=True,
    )
  )(z)
  np.testing.assert_array_equal(path.z[0], z)
  assert len(path.logsnr) == 64
  np.testing.assert_allclose(path.logsnr[0], logsnr, rtol=1e-5)
  np.testing.assert_allclose(path.x[-1], gaussian_flow(z, logsnr), atol=0.01)


def z_shape(num):
  return (num, *SHAPE)


def test_a_bfloat16_denoiser_is_stepped_in_float32():
  low = lambda z, logsnr: gaussian_denoise(z, logsnr).astype(jnp.bfloat16)
  path = trajectory(low, steps=3)
  assert path.x.dtype == path.z.dtype == jnp.float32


def test_float64_stays_float64():
  with jax.enable_x64(True):
    z = jnp.ones(z_shape(1), jnp.float64)
    for sampler in SAMPLERS:
      found = run(keys(1), z, steps=2, options=(('sampler', sampler),))
      assert found.dtype == jnp.float64


def test_the_network_is_traced_once_for_any_number_of_steps():
  def traces(steps):
    count = []

    def denoise(z, logsnr):
      count.append(1)
      return z

    jax.eval_shape(lambda keys: sampled(keys, denoise, steps=steps), keys(1))
    return len(count)

  assert traces(2) == traces(200) == 1


@pytest.mark.parametrize(
  'field, value',
  [
    ('steps', 0),
    ('sampler', 'euler'),
    ('grid', 'sigma'),
    ('threshold', 'hard'),
    ('percentile', 0.995),
    ('guidance_interval', (3.0, -2.0)),
    ('guidance_schedule', (1.0,)),
    ('guidance_schedule', (0.0, -1.0)),
    ('guidance_rescale', 1.5),
    ('apg_eta', -0.5),
    ('apg_norm', 0.0),
    ('apg_momentum', -1.0),
    ('strength', 0.0),
    ('strength', 1.5),
    ('gamma', 1.5),
    ('eta', -1.0),
  ],
)
def test_impossible_settings_are_named(field, value):
  with pytest.raises(SettingError) as caught:
    SamplerSpec(**{field: value})
  assert caught.value.field == field


def test_a_new_sampler_is_a_function_and_a_line_in_the_table(monkeypatch):
  """This one ignores the prediction and scales z by eta."""

  def step(z, x, noise, at, *, eta):
    return eta * z

  with pytest.raises(SettingError):
    SamplerSpec(sampler='mine')
  mine = samplers.Sampler(step, options=('eta',), stochastic=lambda _: False)
  monkeypatch.setitem(SAMPLERS, 'mine', mine)
  path = trajectory(gaussian_denoise, steps=3, sampler='mine', eta=0.5)
  np.testing.assert_allclose(path.z[1:], 0.5 * path.z[:-1])


# Inpainting.


def test_a_mask_keeps_pixels_to_the_bit_and_generates_the_rest():
  known = jax.random.uniform(jax.random.key(3), (2, 8, 8, 3), minval=-1)
  mask = jnp.zeros((2, 8, 8, 1)).at[:, 2:6, 3:].set(1)

  def run(mask, sampler='ddpm'):
    return sampled(
      keys(2),
      lambda z, logsnr: jnp.tanh(z),
      z=reverse.initial_noise(keys(2), (8, 8, 3)),
      steps=4,
      sampler=sampler,
      inpaint=None if mask is None else reverse.Inpaint(known, mask),
    )

  kept = np.broadcast_to(mask == 0, known.shape)
  for sampler in SAMPLERS:
    out = run(mask, sampler)
    np.testing.assert_array_equal(out[kept], known[kept])
    assert np.abs(out - known)[~kept].min() > 1e-5
  # With the same noise, a mask of ones is the same as no mask.
  everywhere = run(jnp.ones_like(mask))
  np.testing.assert_allclose(everywhere, run(None), atol=1e-6)


def test_kept_pixels_enter_with_the_noise_that_the_step_expects():
  known = jnp.full((64, 8, 8, 3), 0.5)
  mask = jnp.zeros((64, 8, 8, 1))
  seen = sampled(
    keys(64),
    lambda z, logsnr: jnp.zeros_like(z),
    steps=4,
    inpaint=reverse.Inpaint(known, mask),
    seen=True,
  )
  for z, logsnr in list(zip(seen.z, seen.logsnr))[1:]:
    alpha, sigma = alpha_sigma(logsnr)
    assert np.mean(z) == pytest.approx(0.5 * float(alpha), abs=0.02)
    assert np.std(z) == pytest.approx(float(sigma), rel=0.02)


@pytest.mark.parametrize('first', [1, 3, 4])
def test_the_step_at_which_numbers_end_is_known(first):
  spec = SamplerSpec(steps=4)
  logsnr = reverse.logsnr_grid(cosine_logsnr, spec)

  def denoise(z, at):
    return jnp.where(over(z, at) < logsnr[first - 1], z, jnp.nan)

  z = reverse.initial_noise(keys(2), SHAPE)
  start = reverse.Reverse(keys(2), z, logsnr, stateless(denoise), spec)
  seen = reverse.finite(start)
  assert seen.tolist() == [i < first for i in range(1, 5)]
