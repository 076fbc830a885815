"""Classifier-free guidance and thresholding (Sections 2.2 and 2.3).

Large guidance weights push the predicted image outside [−1, 1], the range of
the training data; thresholding brings it back at every step. Samplers are
independent of both: `guided` turns a network into denoise(z, logsnr) -> x.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.process import over, to_x
from imagen_jax.typing import Array, LogSNR, Sample, Scalars

THRESHOLDS = ('dynamic', 'static', None)


def guide(cond: Sample, uncond: Sample, weight: Scalars) -> Sample:
  """Classifier-free guidance: w · cond + (1 − w) · uncond (eq. 2).

  w = 1 is the conditional model, w = 0 the unconditional one. The weights add
  up to 1 and x, eps and v are affine in each other at a given z, so guiding
  any of them gives the same result.

  Args:
    cond, uncond: [B, ...].
    weight: a number or [B].
  """
  weight = over(cond, weight)
  return weight * cond + (1 - weight) * uncond


def static_threshold(x: Sample) -> Sample:
  """Clips the predicted image to [−1, 1] (Section 2.3)."""
  return jnp.clip(x, -1, 1)


def dynamic_threshold(x: Sample, *, percentile: float = 99.5) -> Sample:
  """Clips x to ±s and divides by s = max(1, percentile of |x|) (A.31).

  The percentile is per sample, over the pixels and channels of x [B, H, W, C].
  Saturated pixels are pushed inwards, not only clipped.
  """
  s = magnitude_percentile(x, percentile)
  s = over(x, jnp.maximum(s, 1))
  return jnp.clip(x, -s, s) / s


def magnitude_percentile(x: Sample, percentile: float) -> LogSNR:
  """The percentile of |x| per sample, [B, ...] -> [B], without sorting.

  Equal to jnp.percentile(|x|, percentile) with linear interpolation. Sorting
  a 1024² image takes about a second on a CPU. Non-negative floats are ordered
  like the integers with the same bits, so bisection over the bits finds an
  order statistic exactly, with one counting pass per bit.

  Args:
    x: [B, ...], float32 or wider.
    percentile: a Python number on a scale of 0 to 100.

  Raises:
    ValueError: percentile is above 100, or at most 1 (probably a fraction).
  """
  if not 1 < percentile <= 100:
    raise ValueError(
      f'percentile is on a scale of 0 to 100, not {percentile} (99.5 in the '
      'paper)'
    )
  x = jnp.abs(x.reshape(x.shape[0], -1))
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  num_bits = x.dtype.itemsize * 8
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'int{num_bits}'))
  position = percentile / 100 * (x.shape[1] - 1)
  rank, fraction = math.floor(position), position % 1

  # The greatest bit pattern with at most `rank` values strictly below it is
  # the value of that rank: set its bits from the top (the sign bit is 0).
  def settle(i: Array, value: Array) -> Array:
    trial = value | (jnp.ones_like(value) << (num_bits - 2 - i))
    below = jnp.sum(bits < trial[:, None], axis=1)
    return jnp.where(below <= rank, trial, value)

  value = jax.lax.fori_loop(0, num_bits - 1, settle, jnp.zeros_like(bits[:, 0]))
  # The value of the next rank is the same one if it is repeated, else the
  # smallest value above it.
  as_float = jax.lax.bitcast_convert_type(value, x.dtype)
  at_most = jnp.sum(bits <= value[:, None], axis=1)
  above = jnp.min(jnp.where(bits > value[:, None], x, jnp.inf), axis=1)
  following = jnp.where(at_most > rank + 1, as_float, above)
  if fraction == 0:
    return as_float
  return as_float * (1 - fraction) + following * fraction


def guided(
  network: Callable,
  *,
  weight: Scalars | None = None,
  prediction: str = 'eps',
  threshold: str | None = 'dynamic',
  percentile: float = 99.5,
  interval: tuple[float, float] | None = None,
) -> Callable[[Array, Array], Array]:
  """Makes denoise(z, logsnr) -> x, with guidance and thresholding.

  Arithmetic outside the network is in z's dtype, float32 or wider. Samplers
  recompute eps from the thresholded x. Where x is Inf, the result is NaN.

  Args:
    network: (z [B, ...], logsnr [B], branch) -> output; `branch` is 'cond',
      or 'both' for the pair (cond, uncond), best from one call with 2B rows.
    weight: guidance weight w, a number or [B]; None evaluates the conditional
      branch only.
    prediction: what the network returns, 'eps', 'v' or 'x'.
    threshold: 'dynamic', 'static' or None.
    percentile: of dynamic thresholding, on a scale of 0 to 100.
    interval: (low, high) log-SNR, inclusive, where guidance is applied
      (Kynkäänniemi et al. 2024); elsewhere only the conditional branch is
      computed. None: everywhere.
  """
  if threshold not in THRESHOLDS:
    raise ValueError(f'threshold is one of {THRESHOLDS}, not {threshold!r}')

  def cond(z: Array, logsnr: Array) -> Array:
    return network(z, logsnr, 'cond').astype(z.dtype)

  def both(z: Array, logsnr: Array, w: Scalars) -> Array:
    given, null = network(z, logsnr, 'both')
    return guide(given.astype(z.dtype), null.astype(z.dtype), w)

  def denoise(z: Array, logsnr: Array) -> Array:
    if weight is None:
      output = cond(z, logsnr)
    elif interval is None:
      output = both(z, logsnr, weight)
    else:
      low, high = interval
      inside = (low <= logsnr) & (logsnr <= high)
      # Rows outside the interval have weight 1, the conditional model.
      w = jnp.where(inside, weight, 1)
      output = jax.lax.cond(
        jnp.any(inside), lambda z, t: both(z, t, w), cond, z, logsnr
      )
    x = to_x(prediction, output, z, logsnr)
    # Clipping would turn Inf into a colour; NaN reaches the result.
    invalid = ~jnp.isfinite(x)
    match threshold:
      case 'dynamic':
        x = dynamic_threshold(x, percentile=percentile)
      case 'static':
        x = static_threshold(x)
    return jnp.where(invalid, jnp.nan, x)

  return denoise
