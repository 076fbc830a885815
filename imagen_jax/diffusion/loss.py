"""The training objective: denoise, at a random time (Section 2.2, App. A).

Imagen predicts eps and minimises E ‖eps − eps̃‖² over t ~ U(0, 1). Whatever
the network predicts, its squared error is the eps error times a number that
depends on the log-SNR alone,

  ‖eps − eps̃‖² = snr ‖x − x̃‖² = alpha² ‖v − ṽ‖²,

so a weighting can be stated once, as a weight on the eps error:

  'eps'      1: the paper
  'x'        1 / snr: the plain error of the image
  'v'        1 / alpha² = 1 + 1 / snr: the plain error of v
  'min_snr'  min(1, γ / snr), γ = 5: the x error times min(snr, γ) (Hang et
             al. 2023)
  'sigmoid'  sigmoid(b − logsnr) · (−d logsnr / dt): the second factor makes
             it an integral over log-SNR that no longer depends on the
             schedule (Kingma and Gao 2023; simpler diffusion 2024)
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.process import diffuse, target
from imagen_jax.typing import Array, Image, LogSNR, PixelMask, Values

WEIGHTINGS = ('eps', 'x', 'v', 'min_snr', 'sigmoid')


@dataclasses.dataclass(frozen=True)
class LossSpec:
  """Which error is minimised.

  Attributes:
    prediction: what the network returns, 'eps' (the paper), 'v' or 'x'.
    weighting: one of `WEIGHTINGS`, see the top of this file; None is the plain
      mean squared error of the prediction.
    stratified: times evenly spaced over the batch with one random offset.
      Each is still U(0, 1); their mean loss varies less. The paper's is plain.
    min_snr_gamma: γ of 'min_snr'.
    sigmoid_bias: b of 'sigmoid'.
  """

  prediction: str = 'eps'
  weighting: str | None = None
  stratified: bool = False
  min_snr_gamma: float = 5.0
  sigmoid_bias: float = 0.0


def log_weight(
  weighting: str,
  logsnr: Values,
  *,
  slope: Values | None = None,
  min_snr_gamma: float = 5.0,
  sigmoid_bias: float = 0.0,
) -> Values:
  """log of a weighting's weight on the eps error; see above. [B] -> [B].

  `slope` is d logsnr / dt, needed by 'sigmoid' only.
  """
  match weighting:
    case 'eps':
      return jnp.zeros_like(logsnr)
    case 'x':
      return -logsnr
    case 'v':
      return -jax.nn.log_sigmoid(logsnr)
    case 'min_snr':
      return jnp.minimum(0.0, math.log(min_snr_gamma) - logsnr)
    case 'sigmoid':
      if slope is None:
        raise ValueError("weighting 'sigmoid' needs the schedule's slope")
      return jax.nn.log_sigmoid(sigmoid_bias - logsnr) + jnp.log(-slope)
  raise ValueError(f'weighting is one of {WEIGHTINGS}, not {weighting!r}')


def diffusion_loss(
  key: jax.Array,
  x: Image,
  predict: Callable[[Array, Array], Array],
  *,
  logsnr_fn: Callable[[Array], Array],
  spec: LossSpec = LossSpec(),
  pixel_weight: PixelMask | None = None,
) -> tuple[LogSNR, dict[str, LogSNR]]:
  """The weighted squared error of a denoiser at a random time (eq. 1).

  Noise and times are sampled for the whole batch from one key, so the result
  does not depend on how the batch is laid out over devices.

  Args:
    key: a jax.random key.
    x: [B, H, W, C], images in [−1, 1].
    predict: (z [B, H, W, C], logsnr [B]) -> the network's output; parameters,
      text and low-resolution images are in its closure.
    logsnr_fn: the schedule, t [B] -> logsnr [B].
    spec: which error.
    pixel_weight: [B, H, W, 1], factors of the pixels' squared errors; they may
      depend on what `predict` is given, but not on x, lest the best prediction
      be another one. None is 1 everywhere.

  Returns:
    loss [B], and a dict of [B]: t, logsnr, mse (the prediction's, with
    `pixel_weight` alone), weight (loss = weight · mse). All float32 or wider.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  batch = x.shape[0]
  key_t, key_eps = jax.random.split(key)
  if spec.stratified:
    offset = jax.random.uniform(key_t, (), x.dtype)
    t = (offset + jnp.arange(batch, dtype=x.dtype) / batch) % 1
  else:
    t = jax.random.uniform(key_t, (batch,), x.dtype)
  eps = jax.random.normal(key_eps, x.shape, x.dtype)

  logsnr, slope = jax.jvp(logsnr_fn, (t,), (jnp.ones_like(t),))
  output = predict(diffuse(x, eps, logsnr), logsnr).astype(x.dtype)
  error = output - target(spec.prediction, x, eps, logsnr)
  error = error**2
  if pixel_weight is not None:
    error = pixel_weight * error
  mse = jnp.mean(error, axis=range(1, x.ndim))

  # From the prediction's error to the eps error, and then its weight. In
  # logarithms the two cancel exactly where they should.
  log_ratio = log_weight(
    spec.weighting or spec.prediction,
    logsnr,
    slope=slope,
    min_snr_gamma=spec.min_snr_gamma,
    sigmoid_bias=spec.sigmoid_bias,
  ) - log_weight(spec.prediction, logsnr)
  weight = jnp.exp(log_ratio)
  return weight * mse, dict(t=t, logsnr=logsnr, mse=mse, weight=weight)
