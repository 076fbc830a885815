"""Samplers: ancestral DDPM, DDIM, DPM-Solver++, its SDE, UniPC (App. A).

A sampler needs only denoise(z, logsnr) -> x. The step of each sampler is a
function with the same arguments,

  step(z, x, noise, at: Step, **options) -> z_s

where z is z_t, x = denoise(z_t), and noise is fresh standard noise, all
[B, ...]. To add a sampler, write such a function and its entry in `SAMPLERS`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from imagen_jax.diffusion import settings
from imagen_jax.diffusion.guidance import GuidanceSpec
from imagen_jax.diffusion.process import eps_from_x, posterior
from imagen_jax.diffusion.schedule import alpha_sigma
from imagen_jax.typing import Scalars, Values

Past = tuple[Values, Values]


class Step(NamedTuple):
  """Where a step is.

  Attributes:
    t, s: the log-SNRs at which it starts and ends, scalars.
    last, before: (x, log-SNR) of the previous step and of the one before it,
      for multistep solvers. Where there was no such step, x is 0 and the
      log-SNR −inf.
  """

  t: Scalars
  s: Scalars
  last: Past | None = None
  before: Past | None = None


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


def dpmpp_step(
  z: Values, x: Values, noise: Scalars, at: Step, *, eta: float = 0.0
) -> Values:
  """DPM-Solver++(2M) and its SDE: extrapolate x over the step (Lu et al. 2022).

  With h half the increase of the log-SNR, the exact solution of the ODE for
  constant x is z_s = (sigma_s / sigma_t) z_t + alpha_s (1 − e^−h) x, which is
  DDIM. Taking x at the middle of the step, on the line through the last two
  predictions, makes it second order. At the first step h_last is infinite, so
  the slope has weight zero. `eta` is that of `ddim_step`; 1 is
  SDE-DPM-Solver++(2M),

    z_s = (sigma_s / sigma_t) e^−h z_t + alpha_s (1 − e^−2h) x
          + sigma_s sqrt(1 − e^−2h) noise.
  """
  if at.last is None:
    raise ValueError('a multistep solver needs the last step')
  x_last, logsnr_last = at.last
  _, sigma_t = alpha_sigma(at.t)
  alpha_s, sigma_s = alpha_sigma(at.s)
  h = (at.s - at.t) / 2
  h_last = (at.t - logsnr_last) / 2
  middle = x + h / (2 * h_last) * (x - x_last)
  if eta == 0:
    return (sigma_s / sigma_t) * z - alpha_s * jnp.expm1(-h) * middle
  fresh = -jnp.expm1(-2 * h) * eta**2  # fraction of the variance
  kept = 0.5 * jnp.log1p(-fresh)
  mean = (sigma_s / sigma_t) * jnp.exp(kept) * z
  mean = mean - alpha_s * jnp.expm1(kept - h) * middle
  return mean + sigma_s * jnp.sqrt(fresh) * noise


def unipc_step(z: Values, x: Values, noise: Scalars, at: Step) -> Values:
  """UniPC of order 2: correct z_t, then step on (Zhao et al. 2023, B₂).

  Its predictor is DPM-Solver++(2M). x, predicted at t, also improves the step
  that ended at t, at no further evaluation of the network: in place of half the
  last slope, D₁ = (x_before − x_last) / r, that step now has

    ρ₁ D₁ + ρ₂ (x − x_last),   ρ₁ + ρ₂ = b₁,   r ρ₁ + ρ₂ = b₂,

  with h half its increase of the log-SNR, r h that of the step before it (r is
  negative), and b₁ and b₂ the moments of e^−λ over the step. Without a step
  before it, r is infinite and ρ₁ is 0.
  """
  if at.last is None or at.before is None:
    raise ValueError('UniPC needs the last two steps')
  (x_last, logsnr_last), (x_before, logsnr_before) = at.last, at.before
  alpha_t, _ = alpha_sigma(at.t)
  h = (at.t - logsnr_last) / 2
  r = (logsnr_before - logsnr_last) / (2 * h)
  decay = jnp.expm1(-h)
  first = -decay / h - 1
  b1, b2 = first / decay, 2 * (-first / h - 0.5) / decay
  rho1 = (b1 - b2) / (1 - r)
  slope = (x_before - x_last) / r
  better = (rho1 - 0.5) * slope + (b1 - rho1) * (x - x_last)
  # At the first step there is nothing to correct.
  corrected = jnp.where(h < jnp.inf, z - alpha_t * decay * better, z)
  return dpmpp_step(corrected, x, noise, at)


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
  'unipc': Sampler(unipc_step, stochastic=lambda spec: False),
  'dpmpp_sde': Sampler(functools.partial(dpmpp_step, eta=1.0)),
}
GRIDS = ('time', 'logsnr')


@dataclasses.dataclass(frozen=True)
class SamplerSpec(GuidanceSpec):
  """The sampler's settings that are compiled in; hashable, for the cache.

  Attributes:
    sampler: a name in `SAMPLERS`.
    steps: evaluations of the network (of all branches with guidance).
    gamma: of 'ddpm', interpolates between the two variances of eq. 6.
    eta: of 'ddim'; 0 is deterministic.
    strength: the time in (0, 1] to which a starting image is noised; the
      number of steps is proportional to it.
    grid: the steps are evenly spaced in 'time' (the paper) or in 'logsnr'. Both
      start at t = 1 exactly ("trailing", Lin et al. 2024).

  Raises:
    SettingError: a value is invalid.
  """

  sampler: str = 'ddpm'
  steps: int = 256
  gamma: float = 0.3
  eta: float = 0.0
  strength: float = 1.0
  grid: str = 'time'

  def __post_init__(self) -> None:
    super().__post_init__()
    settings.check(
      self,
      ('sampler', self.sampler in SAMPLERS, settings.one_of(SAMPLERS)),
      ('grid', self.grid in GRIDS, settings.one_of(GRIDS)),
      ('steps', 1 <= self.steps <= 1_000_000, 'it lies in [1, 1000000].'),
      ('strength', 0 < self.strength <= 1, 'it lies in (0, 1].'),
      ('gamma', 0 <= self.gamma <= 1, settings.UNIT),
      ('eta', 0 <= self.eta <= 1, settings.UNIT),
    )
