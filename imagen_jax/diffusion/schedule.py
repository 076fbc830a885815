"""How much noise there is at time t, as a log signal-to-noise ratio.

The forward process is variance-preserving in continuous time (Appendix A):

  z_t = alpha_t x + sigma_t eps,   alpha² + sigma² = 1,   eps ~ N(0, I),
  logsnr = log(alpha² / sigma²), falling from t = 0 (data) to t = 1 (noise).

A schedule is a function logsnr(t) and nothing else. The networks, the losses
and the samplers are conditioned on the log-SNR, never on the time, so a
schedule can be exchanged without touching them. Numbers follow the dtype of
their arguments.
"""

import math

import jax
import jax.numpy as jnp

from imagen_jax.typing import Scalars, Values


def alpha_sigma(logsnr: Scalars) -> tuple[Values, Values]:
  """(alpha, sigma) of the variance-preserving process at a log-SNR (App. A).

  alpha² = sigmoid(logsnr), sigma² = sigmoid(−logsnr): alpha² + sigma² = 1 for
  every logsnr, and neither is a difference of nearly equal numbers.
  """
  return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def cosine_logsnr(
  t: Scalars, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0
) -> Values:
  """The cosine schedule: alpha = cos(πt/2), its two ends cut off (F.1, F.2).

  t in [0, 1], any shape, gives logsnr from `logsnr_max` down to `logsnr_min`:
  −2 log tan(a t + b), with a and b such that the ends are met. It is Nichol
  and Dhariwal's schedule without their offset s, which only kept their first
  discrete step from being empty; in continuous time the cut does that.

  The paper does not give the limits. ±15 (alpha or sigma of 5.5e-4) because
  * at t = 1 sampling starts from N(0, I) instead of the true N(alpha x,
    sigma²): ½ Σ alpha² x² is at most 0.002 nats for a 64² image of ±1s and
    0.5 for 1024²; at −10 it is 0.3 and 71.
  * x = (z − sigma eps) / alpha magnifies an error in eps by 1/alpha: 1808
    here, 22026 at −20, where fp32 rounding alone would cost x a third of a
    grey level.
  * at t = 0 the noise left is a fourteenth of an 8-bit grey level; at +10 it
    would be nearly a whole one.
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

  t in [0, 1], any shape. The discrete process shrinks the signal's square by
  1 − beta at each step, beta rising linearly; between the steps

    alpha²(t) = exp(−num_steps ∫₀ᵗ beta),   logsnr = −log(1/alpha² − 1),

  which for the default numbers is −log expm1(0.1 t + 9.95 t²), −10.05 at
  t = 1 (the discrete process ends at −10.12: log(1 − beta) instead of −beta).
  Without noise at t = 0 that would be infinite; it is capped at `logsnr_max`,
  which matters below t = 3e-6 only.
  """
  slope = 0.5 * (beta_end - beta_start)
  integral = num_steps * (beta_start * t + slope * t**2)
  # The floor under the integral is the cap on the log-SNR.
  floor = math.log1p(math.exp(-logsnr_max))
  return -jnp.log(jnp.expm1(jnp.maximum(integral, floor)))


def shifted_logsnr(
  logsnr: Scalars, *, resolution: int, base_resolution: int = 64
) -> Values:
  """The log-SNR that hides as much of a larger image (simple diffusion).

  Averaging over a (resolution / base_resolution)² block, what an image's
  content survives, divides the noise's variance by the block's size. Adding
  2 log(base_resolution / resolution), −2.77 from 64 to 256, takes it back:

    logsnr_fn = lambda t: shifted_logsnr(cosine_logsnr(t), resolution=256)

  Both ends shift too (Hoogeboom et al. 2023).
  """
  return jnp.asarray(logsnr) + 2 * math.log(base_resolution / resolution)
