"""IF's discrete-time diffusion (1000 steps); samplers as coefficient tables.

A step of every sampler here is a linear combination,

  z' = a z + b x + c (x − x_last) + std · noise,

whose coefficients depend only on the noise levels of the steps. They are
computed in float64, because they are differences of nearly equal numbers, and
the loop (`sampling.py`) gets them as float32 rows.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from imagen_jax.errors import ModelError, UsageError, check_choice
from imagen_jax.io import files

WHAT = (
  "an IF stage is a folder in diffusers' layout, with "
  'scheduler/scheduler_config.json in it'
)
# Number of steps in each of several equal sections, the least noisy first.
RESPACINGS = {
  'fast27': '10,10,3,2,2',
  'smart27': '7,4,2,1,2,4,7',
  'smart50': '10,6,4,3,2,2,3,4,6,10',
  'smart100': '1,1,1,1,2,2,2,2,2,2,3,3,4,4,5,5,6,7,7,8,9,10,13',
  'smart185': '1,1,2,2,2,3,3,3,4,5,6,7,8,9,10,11,12,13,14,15,16,18,20',
  'super27': '1,1,1,1,1,1,1,2,5,13',
  'super40': '2,2,2,2,2,2,3,4,6,15',
  'super100': '4,4,6,6,8,8,10,10,14,30',
}
Steps = Int[np.ndarray, ' n']
SAMPLERS = ('ddpm', 'ddim', 'dpmpp')


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A `scheduler_config.json`, with diffusers' names and defaults.

  Attributes:
    num_train_timesteps: T, 1000.
    beta_schedule: 'squaredcos_cap_v2' (IF's) or 'linear'.
    beta_start, beta_end: of 'linear'.
    variance_type: 'learned_range', 'fixed_small' or 'fixed_large'.
    thresholding: dynamic thresholding of the predicted image.
    dynamic_thresholding_ratio: its quantile, 0 to 1.
    sample_max_value: cap on its threshold: 1.5 in stage I, 1 in stage II.
    clip_sample: without thresholding, clip to ±clip_sample_range.
    clip_sample_range: see `clip_sample`.
    timestep_spacing: 'leading', 'trailing' or 'linspace'.
    lambda_min_clipped: DPM-Solver++ starts above this half log-SNR.
  """

  num_train_timesteps: int = 1000
  beta_schedule: str = 'linear'
  beta_start: float = 1e-4
  beta_end: float = 0.02
  variance_type: str = 'fixed_small'
  thresholding: bool = False
  dynamic_thresholding_ratio: float = 0.995
  sample_max_value: float = 1.0
  clip_sample: bool = True
  clip_sample_range: float = 1.0
  timestep_spacing: str = 'leading'
  lambda_min_clipped: float = -5.1


POSITIVE = ('num_train_timesteps', 'beta_start', 'beta_end')
CHOICES = {
  'beta_schedule': ('squaredcos_cap_v2', 'linear'),
  'variance_type': ('learned_range', 'fixed_small', 'fixed_large'),
  'timestep_spacing': ('leading', 'trailing', 'linspace'),
}


def read(folder: str | pathlib.Path, name: str = 'scheduler') -> Schedule:
  """The `Schedule` of a stage's folder.

  Keys that no sampler here needs are ignored; a `prediction_type` other than
  epsilon is refused.

  Raises:
    ModelError: the file is missing, or has a value that is not supported.
  """
  path = pathlib.Path(folder) / name / 'scheduler_config.json'
  return parse(files.read_json(path, missing=WHAT), path)


def parse(
  raw: Mapping[str, Any], path: str | pathlib.Path = 'scheduler_config.json'
) -> Schedule:
  """A `Schedule` from the JSON object; `path` is for error messages."""
  if raw.get('prediction_type', 'epsilon') != 'epsilon':
    raise ModelError(
      f'{path} has prediction_type {raw["prediction_type"]!r}; IF predicts '
      'epsilon.'
    )
  fields = {field.name for field in dataclasses.fields(Schedule)}
  given = {k: v for k, v in raw.items() if k in fields}
  for key, value in given.items():
    default = getattr(Schedule, key)
    number = isinstance(default, float) and type(value) is int
    if not (number or type(value) is type(default)) or (
      value != value or (key in POSITIVE and not 0 < value < np.inf)
    ):
      raise ModelError(
        f'{path} has {key} {value!r}; it is a value such as {default!r}.'
      )
  result = Schedule(**given)
  for key, allowed in CHOICES.items():
    if getattr(result, key) not in allowed:
      raise ModelError(
        f'{path} has {key} {getattr(result, key)!r}; known are '
        f'{", ".join(allowed)}.'
      )
  return result


def alphas_cumprod(schedule: Schedule) -> Float[np.ndarray, ' t']:
  """ᾱ_t = Π (1 − β): the signal's fraction of the variance, float64 [T]."""
  steps = schedule.num_train_timesteps
  if schedule.beta_schedule == 'linear':
    betas = np.linspace(schedule.beta_start, schedule.beta_end, steps)
  else:
    edges = np.arange(steps + 1) / steps
    curve = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    # Without the cap the last step would have no signal at all.
    betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
  return np.cumprod(1 - betas)


def timesteps(
  schedule: Schedule, steps: int | str, sampler: str = 'ddpm'
) -> Steps:
  """The step numbers of a run, the noisiest first.

  Args:
    schedule: `Schedule`.
    steps: their number, spaced as the schedule says, or one of IF's respacings,
      see `respaced`.
    sampler: 'dpmpp' has its own spacing, which leaves out the last steps of
      IF's schedule: it is unstable where the log-SNR drops so steeply.

  Raises:
    UsageError: the number is out of range, or the respacing is invalid.
  """
  if isinstance(steps, str) and not steps.isdigit():
    return respaced(steps, schedule.num_train_timesteps)
  steps, total = int(steps), schedule.num_train_timesteps
  if not 1 <= steps <= total:
    raise UsageError(
      f'steps is {steps}; it lies between 1 and {total}, or is one of '
      f'{", ".join(RESPACINGS)}.',
      key='steps',
    )
  spacing = schedule.timestep_spacing
  if sampler == 'dpmpp':
    abar = alphas_cumprod(schedule)
    half_logsnr = np.log(abar / (1 - abar)) / 2
    last = np.sum(half_logsnr >= schedule.lambda_min_clipped) - 1
    return np.rint(np.linspace(0, last, steps + 1)).astype(int)[:0:-1]
  if spacing == 'leading':
    return (np.arange(steps) * (total // steps))[::-1]
  if spacing == 'trailing':
    return np.rint(total - np.arange(steps) * (total / steps)).astype(int) - 1
  return np.rint(np.linspace(0, total - 1, steps)).astype(int)[::-1]


def respaced(spec: str, total: int = 1000) -> Steps:
  """IF's respacings: a number of steps in each of several equal sections.

  Args:
    spec: a name in `RESPACINGS`, or numbers separated by commas, the least
      noisy section first; a section with 0 is skipped.
    total: number of training steps T.

  Raises:
    UsageError: an unknown name, or more steps than a section has.
  """
  try:
    counts = [int(n) for n in RESPACINGS.get(spec, spec).split(',')]
  except ValueError:
    raise UsageError(
      f'steps {spec!r} is unknown; give a number, one of '
      f'{", ".join(RESPACINGS)}, or numbers of steps such as 10,10,3,2,2.',
      key='steps',
    ) from None
  size, extra = divmod(total, len(counts))
  chosen, start = [], 0
  for i, count in enumerate(counts):
    width = size + (i < extra)
    if not 0 <= count <= width:
      raise UsageError(
        f'steps {spec!r} wants {count} in section {i}, which has {width}.',
        key='steps',
      )
    stride = (width - 1) / (count - 1) if count > 1 else 1
    position = 0.0
    for _ in range(count):
      chosen.append(start + round(position))
      position += stride
    start += width
  if not chosen:
    raise UsageError(f'steps {spec!r} leaves no step at all.', key='steps')
  return np.array(chosen[::-1])


class Plan(NamedTuple):
  """The coefficients of n steps, float32 [n] each.

  Attributes:
    t: step number.
    alpha, sigma: of the noisy image before the step.
    z, x, slope: a, b, c of the formula at the top of this file.
    log_low, log_high: log variances of the step's noise between which the
      network interpolates (Nichol and Dhariwal 2021).
    noise: 1 where the step adds noise, else 0.
  """

  t: np.ndarray
  alpha: np.ndarray
  sigma: np.ndarray
  z: np.ndarray
  x: np.ndarray
  slope: np.ndarray
  log_low: np.ndarray
  log_high: np.ndarray
  noise: np.ndarray


def plan(
  schedule: Schedule,
  steps: Steps | Sequence[int],
  sampler: str = 'ddpm',
  *,
  end: float = 1.0,
) -> Plan:
  """The `Plan` of a sampler on given steps.

  Args:
    schedule: `Schedule`.
    steps: step numbers, descending: `timesteps(…)`, or the later part of it.
    sampler: 'ddpm' (ancestral), 'ddim' (deterministic, with eps of the
      thresholded image, as in IF's own loop), or 'dpmpp', the second-order
      multistep DPM-Solver++, whose last step is of first order.
    end: ᾱ after the last step; 1 is no noise.

  Raises:
    UsageError: an unknown sampler.
  """
  check_choice('sampler', sampler, SAMPLERS, key='sampler')
  abar = alphas_cumprod(schedule)[np.asarray(steps)]
  after = np.append(abar[1:], end)
  alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
  alpha_s, sigma_s = np.sqrt(after), np.sqrt(1 - after)
  zero = np.zeros(len(abar))
  beta = 1 - abar / after
  rows = dict(t=np.asarray(steps), alpha=alpha, sigma=sigma)
  rows |= dict(slope=zero, log_low=zero, log_high=zero, noise=zero)
  if sampler == 'ddpm':
    low = np.maximum((1 - after) / (1 - abar) * beta, 1e-20)
    rows |= dict(
      z=np.sqrt(abar / after) * (1 - after) / (1 - abar),
      x=alpha_s * beta / (1 - abar),
      log_low=np.log(low),
      log_high=np.log(beta),
      noise=(np.arange(len(abar)) < len(abar) - 1).astype(float),
    )
  else:
    # DDIM is DPM-Solver++ of first order.
    ratio = sigma_s / sigma
    rows |= dict(z=ratio, x=alpha_s - alpha * ratio)
  if sampler == 'dpmpp' and len(abar) > 1:
    half = np.log(alpha / sigma)
    with np.errstate(divide='ignore'):
      h = np.log(alpha_s / sigma_s) - half
    slope = np.zeros(len(abar))
    slope[1:] = h[1:] / np.diff(half) / 2 * rows['x'][1:]
    rows['slope'] = np.where(np.isfinite(slope), slope, 0)
  return Plan(**{k: v.astype(np.float32) for k, v in rows.items()})


def later(steps: Steps, strength: float) -> Int[np.ndarray, ' kept']:
  """The last fraction `strength` of the steps, for starting from an image.

  Raises:
    UsageError: strength is outside (0, 1], or leaves no step.
  """
  count = min(int(len(steps) * strength), len(steps))
  if not 0 < strength <= 1 or count < 1:
    raise UsageError(
      f'strength is {strength:g}; it lies above 0 and up to 1, and leaves '
      f'at least one of {len(steps)} steps.',
      key='strength',
    )
  return steps[len(steps) - count :]
