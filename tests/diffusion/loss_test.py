"""The loss: the paper's by default; other weightings reweight it exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import loss, process, schedule
from imagen_jax.diffusion.loss import WEIGHTINGS, LossSpec
from imagen_jax.diffusion.process import PREDICTIONS
from imagen_jax.diffusion.schedule import alpha_sigma

COSINE = schedule.cosine_logsnr


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def images(batch=8, dtype=jnp.float64):
  return jax.random.uniform(
    jax.random.key(7), (batch, 4, 4, 3), dtype, minval=-1, maxval=1
  )


def denoiser(prediction):
  """The same (bad) denoiser in eps, v or x parameterisation."""

  def predict(z, logsnr):
    eps = jnp.tanh(z)
    x = process.x_from_eps(z, eps, logsnr)
    return process.target(prediction, x, eps, logsnr)

  return predict


def mild(t):
  """A schedule without extreme log-SNRs, accurate in float64."""
  return schedule.cosine_logsnr(t, logsnr_min=-8, logsnr_max=8)


def test_default_is_the_papers_mean_squared_error_of_eps(float64):
  x, seen = images(), {}

  def predict(z, logsnr):
    seen.update(z=z, logsnr=logsnr)
    return 0.5 * z

  value, aux = loss.diffusion_loss(
    jax.random.key(0), x, predict, logsnr_fn=COSINE
  )
  eps = process.eps_from_x(seen['z'], x, seen['logsnr'])
  expected = jnp.mean((0.5 * seen['z'] - eps) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(value, expected, rtol=1e-9)
  np.testing.assert_allclose(seen['logsnr'], COSINE(aux['t']))
  assert value.shape == (8,)


def test_noise_is_standard_and_independent_of_time_and_image():
  batch, seen = 256, []

  def predict(z, logsnr):
    seen.append(z / alpha_sigma(process.over(z, logsnr))[1])
    return 0 * z

  value, aux = loss.diffusion_loss(
    jax.random.key(0), jnp.zeros((batch, 8, 8, 3)), predict, logsnr_fn=COSINE
  )
  # mean(eps²) has mean 1 and standard deviation sqrt(2/192) per sample.
  assert float(value.mean()) == pytest.approx(1, abs=4 * 0.102 / 16)
  assert float(value.std()) == pytest.approx(0.102, abs=0.02)
  assert abs(np.corrcoef(value, aux['t'])[0, 1]) < 0.25
  # They do not share random bits either.
  eps = np.ravel(seen[0])
  assert abs(np.corrcoef(eps[:batch], aux['t'])[0, 1]) < 0.25
  assert abs(np.corrcoef(eps.reshape(batch, -1)[:, 0], aux['t'])[0, 1]) < 0.25


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_unweighted_loss_is_the_predictions_own_error(prediction):
  x = images(dtype=jnp.float32)
  value, aux = loss.diffusion_loss(
    jax.random.key(1),
    x,
    denoiser(prediction),
    logsnr_fn=COSINE,
    spec=LossSpec(prediction=prediction),
  )
  assert (aux['weight'] == 1).all()
  assert (value == aux['mse']).all()


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_a_weighting_is_the_same_loss_under_any_prediction(float64, weighting):
  """The v loss with 'eps' weighting is the eps loss of the same network."""
  x = images()
  values = [
    loss.diffusion_loss(
      jax.random.key(2),
      x,
      denoiser(prediction),
      logsnr_fn=mild,
      spec=LossSpec(prediction=prediction, weighting=weighting),
    )[0]
    for prediction in PREDICTIONS
  ]
  np.testing.assert_allclose(values[1], values[0], rtol=1e-9)
  np.testing.assert_allclose(values[2], values[0], rtol=1e-9)


@pytest.mark.parametrize('weighting', ['eps', 'v', 'x'])
def test_a_weighting_named_as_a_prediction_is_its_plain_error(
  float64, weighting
):
  x = images()
  arguments = jax.random.key(3), x
  crossed, _ = loss.diffusion_loss(
    *arguments,
    denoiser('eps'),
    logsnr_fn=mild,
    spec=LossSpec(weighting=weighting),
  )
  plain, _ = loss.diffusion_loss(
    *arguments, denoiser(weighting), logsnr_fn=mild, spec=LossSpec(weighting)
  )
  np.testing.assert_allclose(crossed, plain, rtol=1e-9)


def test_weights_on_the_eps_error_are_the_published_ones(float64):
  def weight(weighting, **options):
    return loss.diffusion_loss(
      jax.random.key(4),
      images(),
      denoiser('eps'),
      logsnr_fn=mild,
      spec=LossSpec(weighting=weighting, **options),
    )[1]

  logsnr, t = (weight('eps')[name] for name in ('logsnr', 't'))
  snr = np.exp(logsnr)
  alpha, sigma = alpha_sigma(logsnr)
  close = dict(rtol=1e-9)
  np.testing.assert_allclose(weight('x')['weight'], 1 / snr, **close)
  np.testing.assert_allclose(weight('v')['weight'], 1 / alpha**2, **close)
  np.testing.assert_allclose(
    weight('min_snr')['weight'], np.minimum(snr, 5) / snr, **close
  )
  np.testing.assert_allclose(
    weight('min_snr', min_snr_gamma=2.0)['weight'],
    np.minimum(snr, 2) / snr,
    **close,
  )
  # −d logsnr / dt of −2 log tan(a t + b) is 2 a / (sin · cos) = 2 a / ασ.
  ends = np.arctan(np.exp([4.0, -4.0]))
  slope = 2 * (ends[0] - ends[1]) / (alpha * sigma)
  np.testing.assert_allclose(
    weight('sigmoid', sigmoid_bias=-1.0)['weight'],
    slope / (1 + np.exp(logsnr + 1)),
    rtol=1e-7,
  )
  assert t.shape == logsnr.shape == (8,)


def test_sigmoid_weighting_is_the_same_integral_under_any_schedule(float64):
  """∫ sigmoid(b − λ) dλ over log-SNRs that both schedules cover."""
  low, high, num = -4.0, 4.0, 200_000
  t = jnp.linspace(0, 1, num)
  integrals = []
  for logsnr_fn in (schedule.cosine_logsnr, schedule.linear_logsnr):
    logsnr, slope = jax.jvp(logsnr_fn, (t,), (jnp.ones_like(t),))
    inside = (logsnr >= low) & (logsnr <= high)
    weight = jnp.exp(loss.log_weight('sigmoid', logsnr, slope=slope))
    integrals.append(float(jnp.where(inside, weight, 0).mean()))
  exact = np.log1p(np.exp(-low)) - np.log1p(np.exp(-high))
  np.testing.assert_allclose(integrals, exact, rtol=1e-3)


def test_times_are_uniform():
  _, aux = loss.diffusion_loss(
    jax.random.key(5),
    jnp.zeros((4096, 1, 1, 1)),
    lambda z, logsnr: z,
    logsnr_fn=COSINE,
  )
  t = np.sort(aux['t'])
  gap = np.abs(t - (np.arange(4096) + 0.5) / 4096).max()  # Kolmogorov-Smirnov
  assert 0.002 < gap < 1.63 / 64


def stratified_times(key, batch=8):
  _, aux = loss.diffusion_loss(
    key,
    jnp.zeros((batch, 1, 1, 1)),
    lambda z, logsnr: z,
    logsnr_fn=COSINE,
    spec=LossSpec(stratified=True),
  )
  return aux['t']


def test_stratified_times_are_evenly_spaced_and_each_uniform():
  t = jax.vmap(stratified_times)(jax.random.split(jax.random.key(6), 4096))
  assert (t >= 0).all() and (t < 1).all()
  np.testing.assert_allclose(np.diff(np.sort(t, axis=1)), 1 / 8, atol=1e-6)
  first = np.sort(t[:, 3])
  gap = np.abs(first - (np.arange(4096) + 0.5) / 4096).max()
  assert gap < 1.63 / 64


def test_batch_sharded_over_devices_gives_the_same_loss():
  devices = jax.devices()
  mesh = jax.make_mesh(
    (len(devices),), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  x = images(len(devices) * 2, jnp.float32)
  run = jax.jit(
    lambda key, x: loss.diffusion_loss(
      key, x, denoiser('eps'), logsnr_fn=COSINE
    )[0]
  )
  together = run(jax.random.key(8), x)
  apart = run(jax.random.key(8), jax.device_put(x, rows))
  np.testing.assert_allclose(together, apart, rtol=1e-5)


def test_bfloat16_network_has_a_float32_loss():
  value, aux = loss.diffusion_loss(
    jax.random.key(9),
    images(dtype=jnp.bfloat16),
    lambda z, logsnr: z.astype(jnp.bfloat16),
    logsnr_fn=COSINE,
    spec=LossSpec(weighting='min_snr'),
  )
  assert value.dtype == jnp.float32
  assert all(part.dtype == jnp.float32 for part in aux.values())


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_every_weight_is_finite_at_the_ends_of_time(weighting):
  t = jnp.asarray([0.0, 0.5, 1.0])
  for logsnr_fn in (schedule.cosine_logsnr, schedule.linear_logsnr):
    logsnr, slope = jax.jvp(logsnr_fn, (t,), (jnp.ones_like(t),))
    weight = jnp.exp(loss.log_weight(weighting, logsnr, slope=slope))
    assert np.isfinite(weight).all()


def test_an_unknown_weighting_is_refused():
  with pytest.raises(ValueError):
    loss.log_weight('snr', jnp.zeros((1,)))


def test_pixel_weights_are_factors_of_the_squared_errors(float64):
  x = images()
  weight = jnp.ones((8, 4, 4, 1)).at[:, 1:].set(0)  # the first row counts

  def loss_of(x, **more):
    key = jax.random.key(3)
    return loss.diffusion_loss(
      key,
      x,
      lambda z, logsnr: jnp.zeros_like(z),
      logsnr_fn=COSINE,
      spec=LossSpec(prediction='x'),
      **more,
    )

  value, aux = loss_of(x, pixel_weight=weight)
  np.testing.assert_allclose(value, jnp.mean(x[:, 0] ** 2, (1, 2)) / 4)
  np.testing.assert_allclose(aux['mse'] * aux['weight'], value)
  ones, plain = loss_of(x, pixel_weight=jnp.ones_like(weight))[0], loss_of(x)[0]
  np.testing.assert_allclose(ones, plain)
