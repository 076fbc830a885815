"""Classifier-free guidance (Section 2.2) and its later variants.

Every variant starts from the differences of the conditional prediction x and
those of other branches, the unconditional one or a weaker model,

  x + Σ (w − 1) f(λ) P(x − x_other),

and without any option f = 1 and P is the identity: eq. 2. Samplers are
independent of all this: `guided` turns a network into denoise(z, logsnr) -> x.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from imagen_jax.diffusion import settings
from imagen_jax.diffusion.process import over, to_x
from imagen_jax.diffusion.schedule import alpha_sigma
from imagen_jax.diffusion.threshold import THRESHOLDS, threshold
from imagen_jax.typing import Array, LogSNR, Sample, Scalars

# What `guided` carries from one step to the next: a sum per other branch.
Memory = tuple[Array, ...]
Denoise = Callable[[Array, Array, Memory], tuple[Array, Memory]]


@dataclasses.dataclass(frozen=True)
class GuidanceSpec:
  """The settings of guidance and thresholding that are compiled in.

  Attributes:
    threshold: 'dynamic', 'static' or None (Section 2.3).
    percentile: of dynamic thresholding, on a scale of 0 to 100.
    guidance_interval: (lowest, highest) log-SNR, inclusive, at which to guide
      (Kynkäänniemi et al. 2024); elsewhere only the conditional branch is
      computed. None: everywhere.
    guidance_schedule: f(λ), see `ramp`; None is 1 everywhere.
    guidance_rescale: φ of `rescale`, in [0, 1]; 0 is none.
    apg_eta, apg_norm, apg_momentum: η, r and β of `apg`; 1, None and 0 are
      plain guidance.

  Raises:
    SettingError: a value is invalid.
  """

  threshold: str | None = 'dynamic'
  percentile: float = 99.5
  guidance_interval: tuple[float, float] | None = None
  guidance_schedule: tuple[float, ...] | None = None
  guidance_rescale: float = 0.0
  apg_eta: float = 1.0
  apg_norm: float | None = None
  apg_momentum: float = 0.0

  def __post_init__(self) -> None:
    interval, factors = self.guidance_interval, self.guidance_schedule
    ordered = interval is None or (
      len(interval) == 2 and interval[0] <= interval[1]
    )
    usable = factors is None or (
      len(factors) > 1 and all(0 <= f < math.inf for f in factors)
    )
    norm, beta = self.apg_norm, self.apg_momentum
    settings.check(
      self,
      ('threshold', self.threshold in THRESHOLDS, settings.one_of(THRESHOLDS)),
      ('percentile', 1 < self.percentile <= 100, 'it lies in (1, 100].'),
      (
        'guidance_interval',
        ordered,
        'it is (lowest, highest) log-SNR, in this order.',
      ),
      (
        'guidance_schedule',
        usable,
        'it is two or more finite factors of at least 0, from noise to image.',
      ),
      ('guidance_rescale', 0 <= self.guidance_rescale <= 1, settings.UNIT),
      ('apg_eta', 0 <= self.apg_eta <= 1, settings.UNIT),
      ('apg_norm', norm is None or 0 < norm < math.inf, 'it is positive.'),
      ('apg_momentum', -1 < beta < 1, 'it lies in (-1, 1).'),
    )

  @property
  def projects(self) -> bool:
    """Whether `apg` differs from plain guidance."""
    neutral = (1.0, None, 0.0)
    return (self.apg_eta, self.apg_norm, self.apg_momentum) != neutral

  def memory(self, z: Array, branches: int) -> Memory:
    """The memory before the first step, for so many other branches."""
    return (jnp.zeros_like(z),) * branches if self.apg_momentum else ()


def guide(cond: Sample, uncond: Sample, weight: Scalars) -> Sample:
  """Classifier-free guidance: w · cond + (1 − w) · uncond (eq. 2).

  w = 1 is the conditional model, w = 0 the unconditional one. The weights add
  up to 1 and x, eps and v are affine in each other at a given z, so guiding
  any of them gives the same result. With a weaker model's prediction in place
  of `uncond` it is autoguidance, D_weak + w (D − D_weak) (Karras et al. 2024).

  Args:
    cond, uncond: [B, ...].
    weight: a number or [B].
  """
  weight = over(cond, weight)
  return weight * cond + (1 - weight) * uncond


def ramp(logsnr: LogSNR, factors: Sequence[float]) -> LogSNR:
  """f(λ), a guidance schedule: the weight is 1 + (w − 1) f(λ).

  f is linear between the factors, which are evenly spaced from noise to image
  in the angle atan(sigma / alpha), the time of the cosine schedule. (0, 1) is a
  linear ramp, (0, 0.15, 0.5, 0.85, 1) nearly the cosine one, (1, 0) guides the
  layout only; with steps + 1 factors each step has its own (Wang et al. 2024
  compare such schedules).

  Args:
    logsnr: [B].
    factors: two or more.
  """
  alpha, sigma = alpha_sigma(logsnr)
  progress = 1 - jnp.arctan2(sigma, alpha) * (2 / math.pi)
  points = jnp.linspace(0, 1, len(factors), dtype=progress.dtype)
  return jnp.interp(progress, points, jnp.asarray(factors, progress.dtype))


def rescale(x: Sample, guided: Sample, phi: float) -> Sample:
  """Guidance rescale: φ (σ_x / σ_guided) guided + (1 − φ) guided.

  σ is the standard deviation over an image's pixels and channels, so that φ = 1
  gives the contrast of the conditional prediction (Lin et al. 2024, Section
  3.4). They rescale the network's output, v, which is −x at pure noise; here x
  itself is, and the result does not depend on the prediction.

  Args:
    x, guided: [B, ...], the conditional and the guided prediction.
    phi: φ in [0, 1].
  """
  axes = tuple(range(1, x.ndim))
  std = lambda y: jnp.std(y, axis=axes, keepdims=True)
  ratio = std(x) / jnp.maximum(std(guided), jnp.finfo(x.dtype).tiny)
  return (phi * ratio + (1 - phi)) * guided


def apg(
  delta: Sample, x: Sample, spec: GuidanceSpec, memory: Memory = ()
) -> tuple[Sample, Memory]:
  """Adaptive projected guidance, P(x − x_other) (Sadat et al. 2024).

    Δ ← Δ + β Δ_last             momentum, best negative
    Δ ← min(1, r / ‖Δ‖) Δ        over an image's pixels and channels
    P = Δ_⊥ + η Δ_∥              Δ_∥ = ⟨Δ, x⟩ / ⟨x, x⟩ x

  The part parallel to x raises contrast and saturation, the other one quality.

  Args:
    delta, x: [B, ...], the difference Δ and the conditional prediction.
    spec: η, r (None: none) and β.
    memory: (Δ_last,), the sum of the last step, if β is not 0.

  Returns:
    P [B, ...] and the memory for the next step.
  """
  axes = tuple(range(1, x.ndim))
  dot = lambda a, b: jnp.sum(a * b, axis=axes, keepdims=True)
  tiny = jnp.finfo(x.dtype).tiny
  if memory:
    delta = delta + spec.apg_momentum * memory[0]
    memory = (delta,)
  if spec.apg_norm is not None:
    norm = jnp.sqrt(dot(delta, delta))
    delta = delta * jnp.minimum(1, spec.apg_norm / jnp.maximum(norm, tiny))
  parallel = dot(delta, x) / jnp.maximum(dot(x, x), tiny) * x
  return delta - (1 - spec.apg_eta) * parallel, memory


def guided(
  network: Callable,
  *,
  weights: Sequence[Scalars] = (),
  prediction: str = 'eps',
  spec: GuidanceSpec = GuidanceSpec(),
) -> Denoise:
  """Makes denoise(z, logsnr, memory) -> (x, memory), guided and thresholded.

  Arithmetic outside the network is in z's dtype, float32 or wider. Samplers
  recompute eps from the thresholded x. Where x is Inf, the result is NaN.

  Args:
    network: (z [B, ...], logsnr [B], branch) -> output; `branch` is 'cond', or
      'all' for (cond, *others), best from one call with a row for each.
    weights: w of each other branch, numbers or [B]; none evaluates the
      conditional branch only.
    prediction: what the network returns, 'eps', 'v' or 'x'.
    spec: the settings.
  """

  def cond(z: Array, logsnr: Array, memory: Memory) -> tuple[Array, Memory]:
    output = network(z, logsnr, 'cond').astype(z.dtype)
    return to_x(prediction, output, z, logsnr), memory

  def every(z: Array, logsnr: Array, memory: Memory) -> tuple[Array, Memory]:
    outputs = [y.astype(z.dtype) for y in network(z, logsnr, 'all')]
    here = [_effective(w, logsnr, spec) for w in weights]
    if spec.projects or spec.guidance_rescale:
      x = [to_x(prediction, y, z, logsnr) for y in outputs]
      return _projected(x, here, spec, memory)
    first, other, *more = outputs
    output = guide(first, other, here[0])
    for other, w in zip(more, here[1:]):
      output = output + over(first, w - 1) * (first - other)
    return to_x(prediction, output, z, logsnr), memory

  def denoise(z: Array, logsnr: Array, memory: Memory) -> tuple[Array, Memory]:
    if not weights:
      x, memory = cond(z, logsnr, memory)
    elif spec.guidance_interval is None:
      x, memory = every(z, logsnr, memory)
    else:
      some = jnp.any(_inside(logsnr, spec.guidance_interval))
      x, memory = jax.lax.cond(some, every, cond, z, logsnr, memory)
    x = threshold(x, spec.threshold, percentile=spec.percentile)
    return x, memory

  return denoise


def _inside(logsnr: LogSNR, interval: tuple[float, float]) -> Array:
  return (interval[0] <= logsnr) & (logsnr <= interval[1])


def _effective(w: Scalars, logsnr: LogSNR, spec: GuidanceSpec) -> Scalars:
  """The weight at a log-SNR; outside the interval 1, the conditional model."""
  if spec.guidance_schedule is not None:
    w = 1 + (w - 1) * ramp(logsnr, spec.guidance_schedule)
  if spec.guidance_interval is not None:
    w = jnp.where(_inside(logsnr, spec.guidance_interval), w, 1)
  return w


def _projected(
  outputs: Sequence[Array],
  weights: Sequence[Scalars],
  spec: GuidanceSpec,
  memory: Memory,
) -> tuple[Array, Memory]:
  """The guided x from (x, *x_others), with `apg` and `rescale`."""
  x, *others = outputs
  total, kept = x, list[Array]()
  for i, (other, w) in enumerate(zip(others, weights)):
    delta, last = apg(x - other, x, spec, memory[i : i + 1])
    total = total + over(x, w - 1) * delta
    kept.extend(last)
  if spec.guidance_rescale:
    total = rescale(x, total, spec.guidance_rescale)
  return total, tuple(kept)
