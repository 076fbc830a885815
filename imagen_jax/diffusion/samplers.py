"""From noise to an image: ancestral DDPM, DDIM and DPM-Solver++ (App. A).

A sampler sees only denoise(z, logsnr) -> x. One step of each of them is a
function with the same arguments,

  step(z, x, noise, *, logsnr_t, logsnr_s, last, **options) -> z_s

where z is z_t, x = denoise(z_t), noise is standard and fresh, and last =
(x, logsnr) of the step before, for multistep solvers. Before the first step
`last` lies at a log-SNR of −inf. z, x and noise are [B, ...], log-SNRs scalar.
A new sampler is such a function and its line in `SAMPLERS`.
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
  """The ancestral sampler, its variance interpolated by gamma (eq. 6)."""
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
  """DDIM: keep the image, shrink the noise (eq. 5; Song et al. 2021).

  eta in [0, 1] replaces that much of the noise's standard deviation by fresh
  noise: 0 is deterministic, 1 is the ancestral sampler with gamma = 0.
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
  z_s = (sigma_s / sigma_t) z_t + alpha_s (1 − e^−h) x, which is DDIM; x at
  the middle of the step instead, on the line through the last two
  predictions, makes it second order. The first step has no past: its h_last
  is infinite, the slope's weight zero.
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
  """One line of `SAMPLERS`.

  Attributes:
    step: see the top of this file.
    options: the fields of `SamplerSpec` that `step` takes.
    stochastic: whether it uses fresh noise with a given spec.
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
  """A field of `SamplerSpec` has a value that cannot work.

  Attributes:
    field: its name, with which the message starts.
  """

  def __init__(self, field: str, value: object, rule: str):
    super().__init__(f'{field} is {value!r}; {rule}')
    self.field = field


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """How to sample: all that is compiled in, so that it can be a cache's key.

  Attributes:
    sampler: a name in `SAMPLERS`.
    steps: evaluations of the network (each of two branches when guided).
    threshold: 'dynamic', 'static' or None (Section 2.3).
    percentile: of dynamic thresholding, on a scale of 0 to 100.
    guidance_interval: (lowest, highest) log-SNR at which to guide, or None for
      everywhere.
    gamma: of 'ddpm', between the two variances of eq. 6.
    eta: of 'ddim'; 0 is deterministic.
    strength: when starting from an image, how far back to noise, in (0, 1];
      the number of steps shrinks with it.
    grid: the steps are evenly spaced in 'time' (the paper) or in 'logsnr'.

  Raises:
    SettingError: a value cannot work.
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
  """An image to keep in part.

  There every step gets it with the noise that the step expects, and the result
  has it as it is.

  Attributes:
    known: [B, H, W, C], the image.
    mask: [B, H, W, 1], 1 where to inpaint, 0 where to keep `known`.
  """

  known: Image
  mask: PixelMask


class Trajectory(NamedTuple):
  """What a sampler went through, step by step.

  Attributes:
    z: [N, B, H, W, C], the noisy image before each step.
    x: [N, B, H, W, C], its prediction; the last one is the result.
    logsnr: [N], where the network was evaluated.
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
  """The log-SNRs from time `start` down to the data, rising.

  Args:
    logsnr_fn: the schedule, t -> logsnr.
    spec: its `steps` would go all the way from t = 1; `start` takes its
      fraction of them, at least 1, and the result has one number more.
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
  """An image from noise, in one evaluation of `denoise` per step.

  Step i goes from logsnr[i] to logsnr[i + 1]; the last one returns the
  predicted x itself, without noise. All is one lax.scan, so the network is
  compiled once for any number of steps.

  Args:
    keys: [B], one key per image. Row b's noise depends on keys[b] and the step
      alone, not on the batch it is sampled in.
    z: [B, H, W, C], noisy as at logsnr[0]; all arithmetic has its dtype,
      float32 or wider.
    logsnr: see `logsnr_grid`.
    denoise: (z [B, H, W, C], logsnr [B]) -> x [B, H, W, C].
    spec: its sampler and the options of that.
    inpaint: what to keep; None inpaints everywhere.
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
  """All that `sample` goes through, from the same arguments."""
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
  """(the images, (z, x) of each step if `record`)."""
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
      # Noise of its own number, so that an image without a mask stays what
      # it was.
      kept = diffuse(inpaint.known, normal(steps + 1 + i), logsnr_s)
      z_next = jnp.where(inpaint.mask > 0, z_next, kept)
      x = jnp.where((inpaint.mask > 0) | (i < steps - 1), x, inpaint.known)
    return (z_next, (x, logsnr_t)), (z, x) if record else None

  past: Past = jnp.zeros_like(z), jnp.asarray(-jnp.inf, dtype)
  # The last prediction is the result, whatever the step after it would be.
  (_, (x, _)), seen = jax.lax.scan(
    body, (z, past), (jnp.arange(steps), logsnr[:-1], logsnr[1:])
  )
  return x, seen
