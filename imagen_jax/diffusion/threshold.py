"""Static and dynamic thresholding of the predicted image (Section 2.3).

Large guidance weights push it outside [−1, 1], the range of the training data;
thresholding brings it back at every step.
"""

import math

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.process import over
from imagen_jax.typing import Array, LogSNR, Sample

THRESHOLDS = ('dynamic', 'static', None)


def threshold(x: Sample, kind: str | None, *, percentile: float) -> Sample:
  """Thresholds x [B, ...] as `kind`, one of `THRESHOLDS`; Inf becomes NaN."""
  # Clipping would turn Inf into a colour; NaN reaches the result.
  invalid = ~jnp.isfinite(x)
  match kind:
    case 'dynamic':
      x = dynamic_threshold(x, percentile=percentile)
    case 'static':
      x = static_threshold(x)
  return jnp.where(invalid, jnp.nan, x)


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

  def of_rank(rank: int) -> Array:
    """The greatest bit pattern with at most `rank` values strictly below it."""

    def settle(i: Array, value: Array) -> Array:
      trial = value | (jnp.ones_like(value) << (num_bits - 2 - i))
      below = jnp.sum(bits < trial[:, None], axis=1)
      return jnp.where(below <= rank, trial, value)

    # From the top; the sign bit is 0.
    zeros = jnp.zeros_like(bits[:, 0])
    value = jax.lax.fori_loop(0, num_bits - 1, settle, zeros)
    return jax.lax.bitcast_convert_type(value, x.dtype)

  low = of_rank(rank)
  if fraction == 0:
    return low
  # Not "the next value above": where a compiler computes x anew for each pass
  # and rounds otherwise, that could be the same pixel.
  return low * (1 - fraction) + of_rank(rank + 1) * fraction
