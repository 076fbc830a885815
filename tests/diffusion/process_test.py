"""Identities of the forward process, its posterior and the conversions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import process
from imagen_jax.diffusion.schedule import alpha_sigma

LOGSNR = (-15.0, -6.0, -0.5, 3.0, 15.0)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def images(num=5, seed=0):
  key_x, key_eps = jax.random.split(jax.random.key(seed))
  shape = (num, 4, 4, 3)
  x = jax.random.uniform(key_x, shape, jnp.float64, -1, 1)
  return x, jax.random.normal(key_eps, shape, jnp.float64)


def test_diffuse_mixes_each_sample_at_its_own_logsnr():
  x, eps = images()
  z = process.diffuse(x, eps, jnp.asarray(LOGSNR))
  for row, logsnr in enumerate(LOGSNR):
    alpha, sigma = alpha_sigma(jnp.float64(logsnr))
    np.testing.assert_allclose(z[row], alpha * x[row] + sigma * eps[row])


@pytest.mark.parametrize('prediction', ['eps', 'v', 'x'])
def test_every_prediction_of_the_truth_is_the_truth(prediction):
  x, eps = images()
  logsnr = jnp.asarray(LOGSNR)
  z = process.diffuse(x, eps, logsnr)
  output = process.target(prediction, x, eps, logsnr)
  np.testing.assert_allclose(
    process.to_x(prediction, output, z, logsnr), x, rtol=1e-9, atol=1e-12
  )


def test_conversions_agree_around_the_triangle():
  x, eps = images()
  logsnr = jnp.asarray(LOGSNR)
  z = process.diffuse(x, eps, logsnr)
  v = process.v_from_x_eps(x, eps, logsnr)
  close = dict(rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(process.eps_from_x(z, x, logsnr), eps, **close)
  np.testing.assert_allclose(process.x_from_v(z, v, logsnr), x, **close)
  np.testing.assert_allclose(process.x_from_eps(z, eps, logsnr), x, **close)


def test_v_is_the_velocity_along_the_circle():
  """With alpha = cos φ, sigma = sin φ: v = dz/dφ (Salimans and Ho 2022)."""
  x, eps = images(1)
  z = lambda phi: process.diffuse(x, eps, -2 * jnp.log(jnp.tan(phi)))
  phi = jnp.float64(0.7)
  _, velocity = jax.jvp(z, (phi,), (jnp.ones_like(phi),))
  v = process.v_from_x_eps(x, eps, -2 * jnp.log(jnp.tan(phi)))
  np.testing.assert_allclose(velocity, v, rtol=1e-9, atol=1e-12)


def test_network_output_in_bfloat16_is_converted_in_float32():
  z = jnp.full((1, 1, 1, 1), 1.001, jnp.float32)
  output = jnp.full((1, 1, 1, 1), 0.5, jnp.bfloat16)
  logsnr = jnp.zeros((1,), jnp.float32)
  x = process.to_x('eps', output, z, logsnr)
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x.ravel(), 1.001 * np.sqrt(2) - 0.5, rtol=1e-6)


@pytest.mark.parametrize('wrong', ['epsilon', ''])
def test_an_unknown_prediction_is_refused(wrong):
  x, eps = images(1)
  with pytest.raises(ValueError):
    process.target(wrong, x, eps, 0.0)
  with pytest.raises(ValueError):
    process.to_x(wrong, x, x, 0.0)


def affine(logsnr_t, logsnr_s, gamma):
  """(coefficient of z, coefficient of x, variance) of the posterior."""
  zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
  step = lambda z, x: process.posterior(
    z, x, logsnr_t=logsnr_t, logsnr_s=logsnr_s, gamma=gamma
  )
  variance = np.asarray(step(zero, zero)[1]).item()
  return step(one, zero)[0].item(), step(zero, one)[0].item(), variance


PAIRS = [(-15.0, -9.0), (-2.0, -1.9), (-1.0, 4.0), (9.0, 15.0)]


@pytest.mark.parametrize('pair', PAIRS)
def test_posterior_of_a_known_image_leads_to_the_forward_marginal(pair):
  """z_t ~ q(z_t|x), then z_s ~ q(z_s|z_t, x): z_s is from q(z_s|x)."""
  on_z, on_x, variance = affine(*pair, gamma=0.0)
  (alpha_t, sigma_t), (alpha_s, sigma_s) = (
    alpha_sigma(jnp.float64(logsnr)) for logsnr in pair
  )
  np.testing.assert_allclose(on_z * alpha_t + on_x, alpha_s, rtol=1e-10)
  np.testing.assert_allclose(
    on_z**2 * sigma_t**2 + variance, sigma_s**2, rtol=1e-10
  )


@pytest.mark.parametrize('pair', PAIRS)
def test_posterior_with_gamma_one_reverses_standard_normal_data(pair):
  """For x ~ N(0, I), E[x|z] = alpha z and z_s|z_t mirrors q(z_t|z_s)."""
  on_z, on_x, variance = affine(*pair, gamma=1.0)
  (alpha_t, _), (alpha_s, _) = (
    alpha_sigma(jnp.float64(logsnr)) for logsnr in pair
  )
  np.testing.assert_allclose(
    on_z + on_x * alpha_t, alpha_t / alpha_s, rtol=1e-10
  )
  np.testing.assert_allclose(variance, 1 - (alpha_t / alpha_s) ** 2, rtol=1e-9)


def test_gamma_is_a_geometric_mean_of_the_two_variances():
  lower, middle, upper = (
    affine(-1.0, 1.0, gamma)[2] for gamma in (0.0, 0.3, 1.0)
  )
  assert lower < upper
  np.testing.assert_allclose(middle, lower**0.7 * upper**0.3, rtol=1e-12)


def test_chained_posteriors_compose():
  """Two steps t -> s -> r with known x have the moments of one step t -> r."""
  x, z = images(1)
  far, half, near = -3.0, -0.5, 2.0
  mid, var_mid = process.posterior(z, x, logsnr_t=far, logsnr_s=half)
  end, var_end = process.posterior(mid, x, logsnr_t=half, logsnr_s=near)
  on_z, _, _ = affine(half, near, 0.0)
  direct, var_direct = process.posterior(z, x, logsnr_t=far, logsnr_s=near)
  np.testing.assert_allclose(end, direct, rtol=1e-10)
  np.testing.assert_allclose(
    on_z**2 * var_mid + var_end, var_direct, rtol=1e-10
  )


def test_augmentation_at_level_zero_is_the_image_bit_for_bit():
  x, eps = (a.astype(jnp.float32) for a in images())
  level = jnp.zeros((len(LOGSNR),), jnp.float32)
  assert (process.augment(eps, x, level) == x).all()
  assert (jax.jit(process.augment)(eps, x, level) == x).all()


def test_augmentation_follows_the_cosine_schedule_per_sample():
  x, eps = images(4)
  level = jnp.asarray([0.1, 0.2, 0.3, 1.0])
  noise = process.augment(eps, jnp.zeros_like(x), level) / eps
  np.testing.assert_allclose(
    noise[:, 0, 0, 0], [0.156, 0.309, 0.454, 1], atol=1e-3
  )
  signal = process.augment(jnp.zeros_like(eps), x, level) / x
  np.testing.assert_allclose(signal**2 + noise**2, 1, rtol=1e-9)
  np.testing.assert_allclose(signal[3], 0, atol=1e-12)
