"""The log-SNR schedules: ends, formulas, and the discrete schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import schedule

SCHEDULES = [schedule.cosine_logsnr, schedule.linear_logsnr]


def test_alpha_and_sigma_preserve_variance_and_give_the_logsnr_back():
  logsnr = jnp.linspace(-20, 20, 401)
  alpha, sigma = schedule.alpha_sigma(logsnr)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=3e-7)
  np.testing.assert_allclose(2 * jnp.log(alpha / sigma), logsnr, atol=1e-5)


@pytest.mark.parametrize('limits', [(-15, 15), (-20, 20), (-10, 12)])
def test_cosine_meets_its_limits(limits):
  low, high = limits
  with jax.enable_x64(True):
    t = jnp.asarray([0.0, 1.0])
    ends = schedule.cosine_logsnr(t, logsnr_min=low, logsnr_max=high)
    np.testing.assert_allclose(ends, [high, low], rtol=1e-9)


def test_cosine_is_the_cosine_between_its_limits():
  with jax.enable_x64(True):
    t = jnp.linspace(0.01, 0.99, 99)
    logsnr = schedule.cosine_logsnr(t, logsnr_min=-40, logsnr_max=40)
    alpha, sigma = schedule.alpha_sigma(logsnr)
    np.testing.assert_allclose(alpha, np.cos(np.pi / 2 * t), atol=1e-8)
    np.testing.assert_allclose(sigma, np.sin(np.pi / 2 * t), atol=1e-8)


def test_linear_is_the_formula_of_its_betas():
  t = np.linspace(0.001, 1, 50)
  np.testing.assert_allclose(
    schedule.linear_logsnr(jnp.asarray(t)),
    -np.log(np.expm1(0.1 * t + 9.95 * t**2)),
    rtol=1e-5,
    atol=1e-5,
  )


def test_linear_follows_the_discrete_thousand_steps():
  alpha2 = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  discrete = np.log(alpha2 / (1 - alpha2))
  t = np.arange(1, 1001) / 1000
  with jax.enable_x64(True):
    continuous = schedule.linear_logsnr(jnp.asarray(t))
  # Equal at low noise; they diverge by log(1 − beta) + beta.
  np.testing.assert_allclose(continuous, discrete, atol=0.1)
  assert discrete[-1] == pytest.approx(-10.118, abs=1e-3)
  assert continuous[-1] == pytest.approx(-10.05, abs=1e-3)


def test_linear_is_capped_at_the_very_start_only():
  assert schedule.linear_logsnr(0.0) == pytest.approx(15)
  assert schedule.linear_logsnr(3e-6) > 14.9
  assert schedule.linear_logsnr(4e-6) < 14.8
  assert schedule.linear_logsnr(0.0, logsnr_max=12.0) == pytest.approx(12)


@pytest.mark.parametrize('logsnr_fn', SCHEDULES)
def test_noise_never_decreases_in_float32(logsnr_fn):
  logsnr = np.asarray(logsnr_fn(jnp.linspace(0, 1, 1025)))
  assert logsnr.dtype == np.float32
  assert np.isfinite(logsnr).all()
  assert (np.diff(logsnr) < 0).all()


@pytest.mark.parametrize('logsnr_fn', SCHEDULES)
def test_slope_is_finite_at_both_ends(logsnr_fn):
  slope = jax.vmap(jax.grad(logsnr_fn))(jnp.asarray([0.0, 1.0]))
  assert np.isfinite(slope).all()
  assert (slope <= 0).all()


def test_shift_is_two_logs_of_the_ratio():
  shift = functools.partial(schedule.shifted_logsnr, 0.0)
  assert shift(resolution=64) == 0
  assert shift(resolution=256) == pytest.approx(-2.7726, abs=1e-4)
  assert shift(resolution=1024) == pytest.approx(-5.5452, abs=1e-4)
  assert shift(resolution=16, base_resolution=32) > 0


def test_an_interpolated_shift_runs_from_one_resolution_to_the_other():
  """For images of 256 pixels from 32 at t = 1 to 256, no shift, at t = 0."""
  t = jnp.asarray([0.0, 0.5, 1.0])
  logsnr = schedule.cosine_logsnr(t)
  found = schedule.interpolated_logsnr(
    t, logsnr, resolution=256, noise=32, image=256
  )
  expected = logsnr - 2 * np.log(8) * t
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_shifted_noise_hides_a_box_mean_as_much():
  """After a 4×4 box mean the shifted schedule at 256 has the SNR of 64."""
  logsnr = 1.0
  alpha, sigma = schedule.alpha_sigma(
    schedule.shifted_logsnr(logsnr, resolution=256)
  )
  averaged = 2 * jnp.log(alpha / (sigma / 4))
  np.testing.assert_allclose(averaged, logsnr, atol=1e-5)
