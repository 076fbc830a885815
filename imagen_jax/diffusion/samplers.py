"""Samplers: ancestral DDPM, DDIM and DPM-Solver++ (App. A).

A sampler needs only denoise(z, logsnr) -> x. The step of each sampler is a
function with the same arguments,

  step(z, x, noise, at: Step, **options) -> z_s

where z is z_t, x = denoise(z_t), and noise is fresh standard noise, all
[B, ...]. To add a sampler, write such a function and its entry in `SAMPLERS`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp

from imagen_jax.diffusion.guidance import THRESHOLDS
from imagen_jax.diffusion.process import eps_from_x, posterior
from imagen_jax.diffusion.schedule import alpha_sigma
from imagen_jax.typing import Scalars, Values

Past = tuple[Values, Values]


class Step(NamedTuple):
  """Where a step is.

  Attributes:
    t, s: the log-SNRs at which it starts and ends, scalars.
    last: (x, log-SNR) of the previous step, for multistep solvers; at the first
      step this log-SNR is −inf.
  """

  t: Scalars
  s: Scalars
  last: Past | None = None


def ddpm_step(
  z: Values, x: Scalars, noise: Scalars, at: Step, *, gamma: float = 0.0
) -> Values:
  """Ancestral sampling, with the variance interpolated by gamma (eq. 6)."""
  mean, variance = posterior(z, x, logsnr_t=at.t, logsnr_s=at.s, gamma=gamma)
  return mean + jnp.sqrt(variance) * noise


def ddim_step(
  z: Values, x: Scalars, noise: Scalars, at: Step, *, eta: float = 0.0
) -> Values:
  """DDIM: z_s = alpha_s x + sigma_s eps (eq. 5; Song et al. 2021).

  eta in [0, 1] scales the standard deviation of the fresh noise: 0 is
  deterministic, 1 is the ancestral sampler with gamma = 0.
  """
  alpha, sigma = alpha_sigma(at.s)
  fresh = -jnp.expm1(at.t - at.s) * eta**2  # fraction of the variance
  eps = eps_from_x(z, x, at.t)
  return alpha * x + sigma * (
    jnp.sqrt(1 - fresh) * eps + jnp.sqrt(fresh) * noise
  )


def dpmpp_step(z: Values, x: Values, noise: Values | None, at: Step) -> Values:
  """DPM-Solver++(2M): extrapolate x over the step (Lu et al. 2022, alg. 2).

  With h half the increase of the log-SNR, the exact solution for constant x is
  z_s = (sigma_s / sigma_t) z_t + alpha_s (1 − e^−h) x, which is DDIM. Taking
  x at the middle of the step, on the line through the last two predictions,
  makes it second order. At the first step h_last is infinite, so the slope
  has weight zero.
  """
  if at.last is None:
    raise ValueError('a multistep solver needs the last step')
  x_last, logsnr_last = at.last
  _, sigma_t = alpha_sigma(at.t)
  alpha_s, sigma_s = alpha_sigma(at.s)
  h = (at.s - at.t) / 2
  h_last = (at.t - logsnr_last) / 2
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

  sampler: str = 'ddpm'
  steps: int = 256
  threshold: str | None = 'dynamic'
  percentile: float = 99.5
  guidance_interval: tuple[float, float] | None = None
  gamma: float = 0.3
  eta: float = 0.0
  strength: float = 1.0
  grid: str = 'time'

  def __post_init__(self) -> None:
    interval = self.guidance_interval
    ordered = interval is None or (
      len(interval) == 2 and interval[0] <= interval[1]
    )
    for field, valid, rule in (
      ('sampler', self.sampler in SAMPLERS, _one_of(SAMPLERS)),
      ('threshold', self.threshold in THRESHOLDS, _one_of(THRESHOLDS)),
      ('grid', self.grid in GRIDS, _one_of(GRIDS)),
      ('steps', 1 <= self.steps <= 1_000_000, 'it lies in [1, 1000000].'),
      ('percentile', 1 < self.percentile <= 100, 'it lies in (1, 100].'),
      ('guidance_interval', ordered, 'it is (lowest, highest) log-SNR.'),
      ('strength', 0 < self.strength <= 1, 'it lies in (0, 1].'),
      ('gamma', 0 <= self.gamma <= 1, 'it lies in [0, 1].'),
      ('eta', 0 <= self.eta <= 1, 'it lies in [0, 1].'),
    ):
      if not valid:
        raise SettingError(field, getattr(self, field), rule)


def _one_of(choices: Iterable[str | None]) -> str:
  return f'choose one of {", ".join(str(name).lower() for name in choices)}.'
