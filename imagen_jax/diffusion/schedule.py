"""Noise schedules: the log signal-to-noise ratio at time t.

The forward process is variance-preserving in continuous time (Appendix A):

  z_t = alpha_t x + sigma_t eps,   alpha² + sigma² = 1,   eps ~ N(0, I),
  logsnr = log(alpha² / sigma²), falling from t = 0 (data) to t = 1 (noise).

A schedule is a function logsnr(t). Networks, losses and samplers use the
log-SNR, never the time, so a schedule can be replaced without changing them.
Results have the dtype of the arguments.
"""

import math

import jax
import jax.numpy as jnp

from imagen_jax.typing import Scalars, Values


def alpha_sigma(logsnr: Scalars) -> tuple[Values, Values]:
  """(alpha, sigma) of the variance-preserving process at a log-SNR (App. A).

  alpha² = sigmoid(logsnr), sigma² = sigmoid(−logsnr): alpha² + sigma² = 1 for
  every logsnr, without cancellation.
  """
  return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def cosine_logsnr(
  t: Scalars, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0
) -> Values:
  """The cosine schedule: alpha = cos(πt/2), truncated at both ends (F.1, F.2).

  t in [0, 1], any shape, gives logsnr from `logsnr_max` down to `logsnr_min`:
  −2 log tan(a t + b), where a and b follow from the limits. It is Nichol and
  Dhariwal's schedule without their offset s, which kept the noise of the first
  discrete step from vanishing; in continuous time the truncation does that.

  The paper does not give the limits. ±15 (alpha or sigma of 5.5e-4), because
  * at t = 1 sampling starts from N(0, I) instead of the true N(alpha x,
    sigma²): ½ Σ alpha² x² is at most 0.002 nats for a 64² image of ±1s and
    0.5 for 1024²; at −10 it is 0.3 and 71.
  * x = (z − sigma eps) / alpha magnifies an error in eps by 1/alpha: 1808
    here, 22026 at −20, where fp32 rounding alone would change x by a third of
    a grey level.
  * at t = 0 the remaining noise is a fourteenth of an 8-bit grey level; at +10
    it would be nearly a whole one.
  """
  b = math.atan(math.exp(-0.5 * logsnr_max))
  a = math.atan(math.exp(-0.5 * logsnr_min)) - b
  return -2 * jnp.log(jnp.tan(a * t + b))


def linear_logsnr(
  t: Scalars,
  *,
  beta_start: float = 1e-4,
  beta_end: float = 0.02,
  num_steps: int = 1000,
  logsnr_max: float = 15.0,
) -> Values:
  """The "1000 step linear schedule" of 256→1024, in continuous time (F.3).

  t in [0, 1], any shape. Each step of the discrete process multiplies alpha²
  by 1 − beta, with beta increasing linearly. In continuous time

    alpha²(t) = exp(−num_steps ∫₀ᵗ beta),   logsnr = −log(1/alpha² − 1).

  With the defaults this is −log expm1(0.1 t + 9.95 t²), −10.05 at t = 1 (the
  discrete process, with log(1 − beta) instead of −beta, ends at −10.12). At
  t = 0 it would be infinite; the cap `logsnr_max` acts below t = 3e-6 only.
  """
  slope = 0.5 * (beta_end - beta_start)
  integral = num_steps * (beta_start * t + slope * t**2)
  # The floor under the integral is the cap on the log-SNR.
  floor = math.log1p(math.exp(-logsnr_max))
  return -jnp.log(jnp.expm1(jnp.maximum(integral, floor)))


def shifted_logsnr(
  logsnr: Scalars, *, resolution: int, base_resolution: int = 64
) -> Values:
  """Shifts a log-SNR to a higher resolution (Hoogeboom et al. 2023).

  Averaging over blocks of (resolution / base_resolution)² pixels preserves the
  content of an image but divides the variance of the noise by the block's
  size. Adding 2 log(base_resolution / resolution), −2.77 from 64 to 256,
  compensates for that:

    logsnr_fn = lambda t: shifted_logsnr(cosine_logsnr(t), resolution=256)

  Both limits are shifted too.
  """
  return jnp.asarray(logsnr) + 2 * math.log(base_resolution / resolution)


def interpolated_logsnr(
  t: Scalars, logsnr: Scalars, *, resolution: int, noise: int, image: int
) -> Values:
  """A shift that changes with the time (Hoogeboom et al. 2023, Section 3.1).

    t shift_noise(logsnr) + (1 − t) shift_image(logsnr)

  where shift_d is `shifted_logsnr` with base_resolution d: at t = 1 the
  schedule is that of images of `noise` pixels a side, which fixes the layout,
  and at t = 0 that of `image` pixels, so that details keep their share of the
  steps.

  Args:
    t: in [0, 1], any shape.
    logsnr: the schedule at t.
    resolution: side of the stage's images.
    noise, image: resolutions, noise ≤ image.
  """
  at_noise, at_image = (
    shifted_logsnr(logsnr, resolution=resolution, base_resolution=d)
    for d in (noise, image)
  )
  return t * at_noise + (1 - t) * at_image
