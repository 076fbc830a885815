"""The forward process, its posterior, and the eps, x and v predictions.

Given z = alpha x + sigma eps, a network may predict the noise eps (Imagen),
the image x, or v = alpha eps − sigma x (progressive distillation, Imagen
Video). With z and the log-SNR, each determines the other two. x, eps, v and z
are [B, ...]; logsnr is [B] or a scalar.

Results have the widest dtype of the arguments: with z and logsnr in float32,
a bfloat16 network output is converted exactly and the arithmetic is float32.
"""

import math

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.schedule import alpha_sigma
from imagen_jax.typing import LowRes, Scalars, Values

PREDICTIONS = ('eps', 'v', 'x')


def over(x: Values, per_sample: Scalars) -> Values:
  """Reshapes [B] or a scalar to [B, 1, ..., 1], to broadcast against x."""
  per_sample = jnp.asarray(per_sample)
  missing = (1,) * (x.ndim - per_sample.ndim)
  return per_sample.reshape(per_sample.shape + missing)


def diffuse(x: Values, eps: Values, logsnr: Scalars) -> Values:
  """z ~ q(z_t | x) = N(alpha x, sigma² I), from standard noise eps (App. A)."""
  alpha, sigma = alpha_sigma(over(x, logsnr))
  return alpha * x + sigma * eps


def x_from_eps(z: Values, eps: Values, logsnr: Scalars) -> Values:
  """x = (z − sigma eps) / alpha."""
  alpha, sigma = alpha_sigma(over(z, logsnr))
  return (z - sigma * eps) / alpha


def x_from_v(z: Values, v: Values, logsnr: Scalars) -> Values:
  """x = alpha z − sigma v."""
  alpha, sigma = alpha_sigma(over(z, logsnr))
  return alpha * z - sigma * v


def eps_from_x(z: Values, x: Scalars, logsnr: Scalars) -> Values:
  """eps = (z − alpha x) / sigma."""
  alpha, sigma = alpha_sigma(over(z, logsnr))
  return (z - alpha * x) / sigma


def v_from_x_eps(x: Values, eps: Values, logsnr: Scalars) -> Values:
  """v = alpha eps − sigma x (Salimans and Ho 2022, Section 4)."""
  alpha, sigma = alpha_sigma(over(x, logsnr))
  return alpha * eps - sigma * x


def target(prediction: str, x: Values, eps: Values, logsnr: Scalars) -> Values:
  """The regression target of a prediction, 'eps', 'v' or 'x'."""
  match prediction:
    case 'eps':
      return eps
    case 'v':
      return v_from_x_eps(x, eps, logsnr)
    case 'x':
      return x
  raise ValueError(f'prediction is one of {PREDICTIONS}, not {prediction!r}')


def to_x(prediction: str, output: Values, z: Values, logsnr: Scalars) -> Values:
  """The predicted x, from a network's output and its inputs z and logsnr."""
  output = output.astype(jnp.promote_types(output.dtype, z.dtype))
  match prediction:
    case 'eps':
      return x_from_eps(z, output, logsnr)
    case 'v':
      return x_from_v(z, output, logsnr)
    case 'x':
      return output
  raise ValueError(f'prediction is one of {PREDICTIONS}, not {prediction!r}')


def posterior(
  z: Values,
  x: Scalars,
  *,
  logsnr_t: Scalars,
  logsnr_s: Scalars,
  gamma: Scalars = 0.0,
) -> tuple[Values, Values]:
  """Mean and variance of a reverse step from z_t to z_s (App. A, eq. 5–6).

    mean     = e^(λt−λs) (alpha_s / alpha_t) z + (1 − e^(λt−λs)) alpha_s x
    variance = (σ̃²_s|t)^(1−γ) (σ²_t|s)^γ

  The variance is interpolated in the logarithm between that of
  q(z_s | z_t, x), σ̃² = (1 − e^(λt−λs)) sigma_s² (γ = 0: exact if x is known),
  and that of q(z_t | z_s), σ² = (1 − e^(λt−λs)) sigma_t² (γ = 1: exact for
  data from N(0, I)). The code factors out 1 − e^(λt−λs).

  Args:
    z, x: [B, ...], the noisy image and the (estimated) clean one.
    logsnr_t, logsnr_s: λt ≤ λs, [B] or scalars.
    gamma: in [0, 1]. The paper gives no value.

  Returns:
    mean [B, ...] and variance, [B, 1, ..., 1] or a scalar.
  """
  logsnr_t, logsnr_s = over(z, logsnr_t), over(z, logsnr_s)
  alpha_t, _ = alpha_sigma(logsnr_t)
  alpha_s, _ = alpha_sigma(logsnr_s)
  known = -jnp.expm1(logsnr_t - logsnr_s)  # 1 − e^(λt−λs), exact for tiny steps
  mean = (1 - known) * (alpha_s / alpha_t) * z + known * alpha_s * x
  variance = known * jnp.exp(
    (1 - gamma) * jax.nn.log_sigmoid(-logsnr_s)
    + gamma * jax.nn.log_sigmoid(-logsnr_t)
  )
  return mean, variance


def augment(eps: LowRes, x_low: LowRes, level: Scalars) -> LowRes:
  """Noise-conditioning augmentation of a low-resolution image (2.4, A.32).

  Gaussian noise as in the forward process, added once, at the low resolution,
  before upsampling; the super-resolution network is conditioned on `level`.
  In training level ~ U(0, 1) per sample; in sampling it is fixed (the paper's
  best-looking samples used 0.1 to 0.3, its best FID 0).

  The paper does not say which schedule maps a level to noise. This is the
  cosine schedule without truncation, alpha = cos(π level / 2): level 0 is the
  image bit for bit; 0.1, 0.2 and 0.3 are sigma 0.16, 0.31 and 0.45.

  Args:
    eps: [B, h, w, C], standard noise.
    x_low: [B, h, w, C], at the low resolution.
    level: [B] or a scalar, in [0, 1].
  """
  angle = over(x_low, level) * (math.pi / 2)
  return jnp.cos(angle) * x_low + jnp.sin(angle) * eps
