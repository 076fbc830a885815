"""Sampling with an IF network: guidance, thresholding and the sampler loop."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool

from imagen_jax.cascade.stage import apply
from imagen_jax.deepfloyd.schedule import Plan, Schedule
from imagen_jax.diffusion.threshold import magnitude_percentile
from imagen_jax.typing import Array, Image, PixelMask, Scalars, TextEmb

Predictor = Callable[[Image, Array], tuple[Image, Image | None]]


def threshold(x: Image, schedule: Schedule) -> Image:
  """Thresholds the predicted image, dynamically or by clipping.

  Dynamic thresholding with a cap: s is the quantile of |x| over an image's
  pixels and channels, clipped to [1, `sample_max_value`]; the image is clipped
  to ±s and divided by s. [B, H, W, C] -> [B, H, W, C].
  """
  if schedule.thresholding:
    ratio = 100 * schedule.dynamic_thresholding_ratio
    s = magnitude_percentile(x, ratio)
    # In this order a cap below 1 takes precedence, as in diffusers.
    s = jnp.minimum(jnp.maximum(s, 1), schedule.sample_max_value)
    s = s[:, None, None, None]
    return jnp.clip(x, -s, s) / s
  if schedule.clip_sample:
    return jnp.clip(x, -schedule.clip_sample_range, schedule.clip_sample_range)
  return x


class Texts(NamedTuple):
  """The text embeddings of the branches of a guided prediction, and weights.

  The symbols are those of `predictor`.

  Attributes:
    text: [B, L, D], of the prompts (c).
    uncond: [B, L, D], of the empty or negative prompt (u); None: no guidance.
    guidance: w, a number or a traced scalar.
    pooled: [B, L, D], for the pooled vector of c; None: `text`.
    mixed: [B, L, D], of the second prompt (p); None: no mixing.
    mixer: m, a number or a traced scalar.
  """

  text: TextEmb
  uncond: TextEmb | None = None
  guidance: Scalars = 1.0
  pooled: TextEmb | None = None
  mixed: TextEmb | None = None
  mixer: Scalars = 0.0


def predictor(
  module: nn.Module,
  params: dict,
  given: Texts,
  *,
  low_res: Image | None = None,
  noise_level: Scalars | None = None,
) -> Predictor:
  """Guided `predict(z, t) -> (eps, v)` for `sample`.

  eps = u + w (c − u), with u predicted from the empty or negative prompt. With
  a second prompt, c is replaced by c (1 − m) + p m, IF's style mixing. v is
  always that of c; None if the network does not predict it. All branches run
  as one batch.

  Args:
    module: `IFUNet`.
    params: its parameters.
    given: the texts and their weights.
    low_res: [B, H, W, 3], upsampled and noised, for a super-resolution stage.
    noise_level: the step number of its noise.
  """
  others = [x for x in (given.mixed, given.uncond) if x is not None]
  batch, count = len(given.text), 1 + len(others)
  texts = jnp.concatenate([given.text, *others])
  pooled = None
  if given.pooled is not None or given.mixed is not None:
    first = given.text if given.pooled is None else given.pooled
    pooled = jnp.concatenate([first, *others])

  def predict(z: Image, t: Array) -> tuple[Image, Image | None]:
    seen = z if low_res is None else jnp.concatenate([z, low_res], axis=-1)
    levels = None
    if noise_level is not None:
      levels = jnp.full((count * batch,), noise_level)
    out = apply(
      module,
      params,
      jnp.concatenate([seen] * count),
      jnp.full((count * batch,), t),
      texts,
      levels,
      pooled,
    )
    channels = z.shape[-1]
    parts = jnp.split(out[..., :channels], count)
    eps: Array = parts[0]
    if given.mixed is not None:
      eps = eps * (1 - given.mixer) + parts[1] * given.mixer
    if given.uncond is not None:
      eps = parts[-1] + given.guidance * (eps - parts[-1])
    learned = out.shape[-1] > channels
    return eps, out[:batch, ..., channels:] if learned else None

  return predict


def sample(
  predict: Predictor,
  plan: Plan,
  z: Image,
  noise: Callable[[jax.Array], Image],
  schedule: Schedule,
  *,
  mask: PixelMask | None = None,
  finite: bool = False,
) -> Image | Bool[Array, ' n']:
  """Runs the steps of a `Plan` as one lax.scan.

  Args:
    predict: (z [B, H, W, C], t scalar) -> (eps, v or None), shaped like z;
      v in [−1, 1] is where the variance lies between its two limits.
    plan: `schedule.Plan`.
    z: [B, H, W, C] float32, the noisy image that the first step expects.
    noise: function of the step's index (traced) -> [B, H, W, C].
    schedule: determines the thresholding and the variance.
    mask: [B, H, W, 1], 1 where to inpaint; elsewhere z is unchanged and never
      noised (IF's inpainting). None: no inpainting.
    finite: return whether each step's images are finite instead, bool [steps].

  Returns:
    [B, H, W, C] float32; NaN where a prediction is NaN or Inf.
  """

  def step(
    carry: tuple[Image, Image], inputs: tuple[jax.Array, Plan]
  ) -> tuple[tuple[Image, Image], Array]:
    z, last = carry
    i, row = inputs
    eps, v = predict(z, row.t)
    eps = eps.astype(z.dtype)
    x = (z - row.sigma * eps) / row.alpha
    # Clipping would turn Inf into a colour; NaN reaches the result.
    x = jnp.where(jnp.isfinite(x), threshold(x, schedule), jnp.nan)
    if schedule.variance_type == 'learned_range' and v is not None:
      fraction: Scalars = (v.astype(z.dtype) + 1) / 2
    else:
      fraction = float(schedule.variance_type == 'fixed_large')
    log_variance = row.log_low + fraction * (row.log_high - row.log_low)
    # 0 · inf is NaN: the predicted variance may overflow.
    std = jnp.where(row.noise > 0, jnp.exp(0.5 * log_variance), 0)
    new = row.z * z + row.x * x + row.slope * (x - last)
    new = new + std * noise(i)
    if mask is not None:
      new = mask * new + (1 - mask) * z
    return (new, x), jnp.isfinite(new).all()

  start: tuple[Image, Image] = (z, jnp.zeros_like(z))
  rows = jnp.arange(len(plan.t)), jax.tree.map(jnp.asarray, plan)
  (z, _), steps = jax.lax.scan(step, start, rows)
  return steps if finite else z


def add_noise(
  image: Image, noise: Image, plan: Plan, mask: PixelMask | None = None
) -> Image:
  """Samples q(z_t | x) at a plan's first step, inside `mask` if given."""
  z = plan.alpha[0] * image + plan.sigma[0] * noise
  return z if mask is None else mask * z + (1 - mask) * image
