"""Samplers: ancestral DDPM, DDIM and DPM-Solver++ (App. A).

A sampler needs only denoise(z, logsnr) -> x. The step of each sampler is a
function with the same arguments,

  step(z, x, noise, *, logsnr_t, logsnr_s, last, **options) -> z_s

where z is z_t, x = denoise(z_t), noise is fresh standard noise, and last =
(x, logsnr) of the previous step, for multistep solvers. At the first step the
log-SNR of `last` is −inf. z, x and noise are [B, ...], log-SNRs are scalars.
To add a sampler, write such a function and its entry in `SAMPLERS`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from imagen_jax.diffusion.guidance import THRESHOLDS
from imagen_jax.diffusion.process import diffuse, eps_from_x, posterior
from imagen_jax.diffusion.schedule import alpha_sigma
from imagen_jax.typing import Array, Image, Keys, PixelMask, Scalars, Values

Past = tuple[Values, Values]


def ddpm_step(
  z: Values,
  x: Scalars,
  noise: Scalars,
  *,
  logsnr_t: Scalars,
  logsnr_s: Scalars,
  last: Past | None = None,
  gamma: float = 0.0,
) -> Values:
  """Ancestral sampling, with the variance interpolated by gamma (eq. 6)."""
  del last
  mean, variance = posterior(
    z, x, logsnr_t=logsnr_t, logsnr_s=logsnr_s, gamma=gamma
  )
  return mean + jnp.sqrt(variance) * noise


def ddim_step(
  z: Values,
  x: Scalars,
  noise: Scalars,
  *,
  logsnr_t: Scalars,
  logsnr_s: Scalars,
  last: Past | None = None,
  eta: float = 0.0,
) -> Values:
  """DDIM: z_s = alpha_s x + sigma_s eps (eq. 5; Song et al. 2021).

  eta in [0, 1] scales the standard deviation of the fresh noise: 0 is
  deterministic, 1 is the ancestral sampler with gamma = 0.
  """
  del last
  alpha, sigma = alpha_sigma(logsnr_s)
  fresh = -jnp.expm1(logsnr_t - logsnr_s) * eta**2  # fraction of the variance
  eps = eps_from_x(z, x, logsnr_t)
  return alpha * x + sigma * (
    jnp.sqrt(1 - fresh) * eps + jnp.sqrt(fresh) * noise
  )


def dpmpp_step(
  z: Values,
  x: Values,
  noise: Values | None,
  *,
  logsnr_t: Scalars,
  logsnr_s: Scalars,
  last: Past,
) -> Values:
  """DPM-Solver++(2M): extrapolate x over the step (Lu et al. 2022, alg. 2).

  With h = (logsnr_s − logsnr_t) / 2, the exact solution for constant x is
  z_s = (sigma_s / sigma_t) z_t + alpha_s (1 − e^−h) x, which is DDIM. Taking
  x at the middle of the step, on the line through the last two predictions,
  makes it second order. At the first step h_last is infinite, so the slope
  has weight zero.
  """
  del noise
  x_last, logsnr_last = last
  _, sigma_t = alpha_sigma(logsnr_t)
  alpha_s, sigma_s = alpha_sigma(logsnr_s)
  h = (logsnr_s - logsnr_t) / 2
  h_last = (logsnr_t - logsnr_last) / 2
  middle = x + h / (2 * h_last) * (x - x_last)
  return (sigma_s / sigma_t) * z - alpha_s * jnp.expm1(-h) * middle


@dataclasses.dataclass(frozen=True)
class Sampler:
  """An entry of `SAMPLERS`.

  Attributes:
    step: see the top of this file.
    options: the fields of `SamplerSpec` that `step` takes.
    stochastic: whether it needs fresh noise for a given spec.
  """

  step: Callable
  options: tuple[str, ...] = ()
  stochastic: Callable[['SamplerSpec'], bool] = lambda spec: True


SAMPLERS = {
  'ddpm': Sampler(ddpm_step, options=('gamma',)),
  'ddim': Sampler(
    ddim_step, options=('eta',), stochastic=lambda spec: spec.eta != 0
  ),
  'dpmpp': Sampler(dpmpp_step, stochastic=lambda spec: False),
}
GRIDS = ('time', 'logsnr')


class SettingError(ValueError):
  """A field of `SamplerSpec` has an invalid value.

  Attributes:
    field: its name; the message starts with it.
  """

  def __init__(self, field: str, value: object, rule: str):
    super().__init__(f'{field} is {value!r}; {rule}')
    self.field = field


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """The sampler's settings that are compiled in; hashable, for the cache.

  Attributes:
    sampler: a name in `SAMPLERS`.
    steps: evaluations of the network (of both branches with guidance).
    threshold: 'dynamic', 'static' or None (Section 2.3).
    percentile: of dynamic thresholding, on a scale of 0 to 100.
    guidance_interval: (lowest, highest) log-SNR at which to guide, or None for
      everywhere.
    gamma: of 'ddpm', interpolates between the two variances of eq. 6.
    eta: of 'ddim'; 0 is deterministic.
    strength: the time in (0, 1] to which a starting image is noised; the
      number of steps is proportional to it.
    grid: the steps are evenly spaced in 'time' (the paper) or in 'logsnr'.

  Raises:
    SettingError: a value is invalid.
  """

  sampler: str = 'dpmpp'
  steps: int = 32
  threshold: str | None = 'dynamic'
  percentile: float = 99.5
  guidance_interval: tuple[float, float] | None = None
  gamma: float = 0.3
  eta: float = 0.0
  strength: float = 1.0
  grid: str = 'time'

  def __post_init__(self) -> None:
    for field, choices in (
      ('sampler', tuple(SAMPLERS)),
      ('threshold', THRESHOLDS),
      ('grid', GRIDS),
    ):
      if getattr(self, field) not in choices:
        names = ', '.join(str(choice).lower() for choice in choices)
        raise SettingError(field, getattr(self, field), f'choose of {names}.')
    interval = self.guidance_interval
    for field, works, rule in (
      ('steps', self.steps >= 1, 'sampling takes at least 1.'),
      (
        'percentile',
        1 < self.percentile <= 100,
        'it is on a scale of 0 to 100, above 1; the paper uses 99.5.',
      ),
      (
        'guidance_interval',
        interval is None or len(interval) == 2 and interval[0] <= interval[1],
        'it is the lowest log-SNR at which to guide, then the highest.',
      ),
      (
        'strength',
        0 < self.strength <= 1,
        'it lies above 0 and up to 1, which forgets the image.',
      ),
      ('gamma', 0 <= self.gamma <= 1, 'it lies in [0, 1].'),
      ('eta', 0 <= self.eta <= 1, 'it lies in [0, 1].'),
    ):
      if not works:
        raise SettingError(field, getattr(self, field), rule)


class Inpaint(NamedTuple):
  """A known image and the mask of the region to inpaint.

  Outside the mask, every step's z is the known image with that step's noise
  level, and the result is the known image itself.

  Attributes:
    known: [B, H, W, C], the image.
    mask: [B, H, W, 1], 1 where to inpaint, 0 where to keep `known`.
  """

  known: Image
  mask: PixelMask


class Trajectory(NamedTuple):
  """The noisy images and predictions of all steps of a sampler.

  Attributes:
    z: [N, B, H, W, C], the noisy image before each step.
    x: [N, B, H, W, C], the prediction at each step; the last is the result.
    logsnr: [N], the log-SNR of z.
  """

  z: Float[Array, 'n b h w c']
  x: Float[Array, 'n b h w c']
  logsnr: Float[Array, ' n']


def initial_noise(
  keys: Keys, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Image:
  """z at t = 1: standard noise [B, *shape], row b from keys[b] alone."""
  return _noise(keys, 0, shape, dtype)


def _noise(
  keys: Keys, index: int | Array, shape: tuple[int, ...], dtype: DTypeLike
) -> Image:
  row = lambda key: jax.random.normal(
    jax.random.fold_in(key, index), shape, dtype
  )
  return jax.vmap(row)(keys)


def logsnr_grid(
  logsnr_fn: Callable[[Array], Array],
  spec: SamplerSpec,
  *,
  start: float = 1.0,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, ' n']:
  """The increasing log-SNRs of the steps from time `start` to 0.

  Args:
    logsnr_fn: the schedule, t -> logsnr.
    spec: its `grid` and `steps`; there are N = max(1, round(steps · start))
      steps, and N + 1 log-SNRs.
    start: a time in (0, 1].
    dtype: float32 or wider.
  """
  steps = max(1, round(spec.steps * start))
  if spec.grid == 'time':
    return logsnr_fn(jnp.linspace(start, 0.0, steps + 1, dtype=dtype))
  first, final = logsnr_fn(jnp.asarray([start, 0.0], dtype))
  return jnp.linspace(first, final, steps + 1)


def sample(
  keys: Keys,
  z: Image,
  logsnr: Float[Array, ' n'],
  denoise: Callable[[Array, Array], Array],
  *,
  spec: SamplerSpec,
  inpaint: Inpaint | None = None,
) -> Image:
  """Samples images from noise, with one evaluation of `denoise` per step.

  Step i goes from logsnr[i] to logsnr[i + 1]; the last one returns the
  predicted x itself, without noise. The steps are one lax.scan, so the network
  is compiled once, whatever their number.

  Args:
    keys: [B], one key per image. Row b's noise depends on keys[b] and the step
      only, not on the rest of the batch.
    z: [B, H, W, C], the noisy images at logsnr[0]; arithmetic is in their
      dtype, float32 or wider.
    logsnr: see `logsnr_grid`.
    denoise: (z [B, H, W, C], logsnr [B]) -> x [B, H, W, C].
    spec: the sampler and its options.
    inpaint: what to keep; None generates the whole image.
  """
  return _run(keys, z, logsnr, denoise, spec, inpaint, record=False)[0]


def trajectory(
  keys: Keys,
  z: Image,
  logsnr: Float[Array, ' n'],
  denoise: Callable[[Array, Array], Array],
  *,
  spec: SamplerSpec,
  inpaint: Inpaint | None = None,
) -> Trajectory:
  """The trajectory of `sample`, which takes the same arguments."""
  _, (z, x) = _run(keys, z, logsnr, denoise, spec, inpaint, record=True)
  return Trajectory(z, x, logsnr[:-1])


def _run(
  keys: Keys,
  z: Image,
  logsnr: Float[Array, ' n'],
  denoise: Callable[[Array, Array], Array],
  spec: SamplerSpec,
  inpaint: Inpaint | None,
  *,
  record: bool,
) -> tuple[Image, Any]:
  """(images, (z, x) of all steps if `record`, else None)."""
  sampler, steps, dtype = SAMPLERS[spec.sampler], len(logsnr) - 1, z.dtype
  options = {name: getattr(spec, name) for name in sampler.options}
  step = functools.partial(sampler.step, **options)
  fresh = sampler.stochastic(spec)
  normal = lambda index: _noise(keys, index, z.shape[1:], dtype)

  def body(
    carry: tuple[Array, Past], step_input: tuple[Array, Array, Array]
  ) -> tuple[tuple[Array, Past], tuple[Array, Array] | None]:
    z, last = carry
    i, logsnr_t, logsnr_s = step_input
    x = denoise(z, jnp.full(z.shape[:1], logsnr_t)).astype(dtype)
    noise = normal(i + 1) if fresh else jnp.zeros_like(z)
    z_next = step(z, x, noise, logsnr_t=logsnr_t, logsnr_s=logsnr_s, last=last)
    if inpaint is not None:
      # A separate noise index: the sampler's noise is the same without a mask.
      kept = diffuse(inpaint.known, normal(steps + 1 + i), logsnr_s)
      z_next = jnp.where(inpaint.mask > 0, z_next, kept)
      x = jnp.where((inpaint.mask > 0) | (i < steps - 1), x, inpaint.known)
    return (z_next, (x, logsnr_t)), (z, x) if record else None

  past: Past = jnp.zeros_like(z), jnp.asarray(-jnp.inf, dtype)
  # The result is the last prediction; the z after it is not used.
  (_, (x, _)), seen = jax.lax.scan(
    body, (z, past), (jnp.arange(steps), logsnr[:-1], logsnr[1:])
  )
  return x, seen
