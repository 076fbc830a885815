"""The training objective: denoising at a random time (Section 2.2, App. A).

Imagen predicts eps and minimises E ‖eps − eps̃‖² over t ~ U(0, 1). The squared
errors of eps, x and v differ by factors that depend on the log-SNR only,

  ‖eps − eps̃‖² = snr ‖x − x̃‖² = alpha² ‖v − ṽ‖²,

so a weighting is defined as a weight on the eps error:

  'eps'      1: the paper
  'x'        1 / snr: the unweighted error of x
  'v'        1 / alpha² = 1 + 1 / snr: the unweighted error of v
  'min_snr'  min(1, γ / snr), γ = 5: the x error times min(snr, γ) (Hang et
             al. 2023)
  'sigmoid'  sigmoid(b − logsnr) · (−d logsnr / dt): the second factor makes
             the loss an integral over log-SNR, independent of the schedule
             (Kingma and Gao 2023; simpler diffusion 2024)
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
  """The loss: prediction, weighting and sampling of the times.

  Attributes:
    prediction: what the network returns, 'eps' (the paper), 'v' or 'x'.
    weighting: one of `WEIGHTINGS`, see the top of this file; None is the
      unweighted mean squared error of the prediction.
    stratified: see `times`.
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
  spec: LossSpec = LossSpec(),
) -> Values:
  """The log of a weighting's weight on the eps error, [B] -> [B].

  `slope` is d logsnr / dt, needed by 'sigmoid' only; `spec` has the options of
  'min_snr' and 'sigmoid'.
  """
  match weighting:
    case 'eps':
      return jnp.zeros_like(logsnr)
    case 'x':
      return -logsnr
    case 'v':
      return -jax.nn.log_sigmoid(logsnr)
    case 'min_snr':
      return jnp.minimum(0.0, math.log(spec.min_snr_gamma) - logsnr)
    case 'sigmoid':
      if slope is None:
        raise ValueError("weighting 'sigmoid' needs the schedule's slope")
      return jax.nn.log_sigmoid(spec.sigmoid_bias - logsnr) + jnp.log(-slope)
  raise ValueError(f'weighting is one of {WEIGHTINGS}, not {weighting!r}')


def times(
  key: jax.Array,
  batch: int,
  *,
  stratified: bool,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> LogSNR:
  """t ~ U(0, 1), [batch] (App. A).

  Stratified times are evenly spaced over the batch with one random offset. Each
  is still U(0, 1), and the batch's loss has less variance. The paper samples
  them independently.
  """
  if not stratified:
    return jax.random.uniform(key, (batch,), dtype)
  offset = jax.random.uniform(key, (), dtype)
  return (offset + jnp.arange(batch, dtype=dtype) / batch) % 1


def diffusion_loss(
  key: jax.Array,
  x: Image,
  predict: Callable[[Array, Array], Array],
  *,
  logsnr_fn: Callable[[Array], Array],
  spec: LossSpec = LossSpec(),
  pixel_weight: PixelMask | None = None,
  t: LogSNR | None = None,
) -> tuple[LogSNR, dict[str, LogSNR]]:
  """The weighted squared error of a denoiser at a random time (eq. 1).

  Noise and times are sampled for the whole batch from one key, so the result
  does not depend on how the batch is sharded.

  Args:
    key: a jax.random key.
    x: [B, H, W, C], images in [−1, 1].
    predict: (z [B, H, W, C], logsnr [B]) -> the network's output; it closes
      over parameters, text and low-resolution images.
    logsnr_fn: the schedule, t [B] -> logsnr [B].
    spec: prediction, weighting and sampling of the times.
    pixel_weight: [B, H, W, 1], weights of the pixels' squared errors. They may
      depend on the inputs of `predict` but not on x, which would change the
      optimal prediction. None is 1 everywhere.
    t: [B] times in [0, 1); None samples them as `spec` says. If x is a part of
      a batch, only the caller can stratify them over all of it.

  Returns:
    loss [B], and a dict of [B]: t, logsnr, mse (of the prediction, with
    `pixel_weight` only), weight (loss = weight · mse). All float32 or wider.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  key_t, key_eps = jax.random.split(key)
  if t is None:
    t = times(key_t, len(x), stratified=spec.stratified, dtype=x.dtype)
  eps = jax.random.normal(key_eps, x.shape, x.dtype)

  logsnr, slope = jax.jvp(logsnr_fn, (t,), (jnp.ones_like(t),))
  return weighted_error(
    predict(diffuse(x, eps, logsnr), logsnr).astype(x.dtype),
    target(spec.prediction, x, eps, logsnr),
    t=t,
    logsnr=logsnr,
    slope=slope,
    spec=spec,
    pixel_weight=pixel_weight,
  )


def weighted_error(
  output: Image,
  aim: Image,
  *,
  t: LogSNR,
  logsnr: LogSNR,
  spec: LossSpec,
  slope: LogSNR | None = None,
  pixel_weight: PixelMask | None = None,
) -> tuple[LogSNR, dict[str, LogSNR]]:
  """The weighted squared error of a network's output; see `diffusion_loss`.

  Args:
    output, aim: [B, H, W, C], of `spec.prediction`.
    t, logsnr, slope: [B], where they are; the slope is for 'sigmoid'.
    spec, pixel_weight: see `diffusion_loss`.
  """
  error = (output - aim) ** 2
  if pixel_weight is not None:
    error = pixel_weight * error
  mse = jnp.mean(error, axis=range(1, aim.ndim))
  # Convert the prediction's error to the eps error, then apply the weight. In
  # logarithms equal factors cancel exactly.
  weighting = spec.weighting or spec.prediction
  log_ratio = log_weight(weighting, logsnr, slope=slope, spec=spec)
  weight = jnp.exp(log_ratio - log_weight(spec.prediction, logsnr))
  return weight * mse, dict(t=t, logsnr=logsnr, mse=mse, weight=weight)
