"""Sampling settings of IF's stages: defaults and a caller's choices."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.cascade import batching
from imagen_jax.deepfloyd import schedule
from imagen_jax.deepfloyd.stage import Stage, noise_terms
from imagen_jax.errors import UsageError, check_choice


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sampling settings of one stage; every field can be set at call time.

  Attributes:
    sampler: 'ddpm', 'ddim' or 'dpmpp'.
    steps: a number, or a respacing's name or counts.
    guidance: classifier-free guidance weight w; up to 1: no guidance.
    aug_level: noise on the upsampled image, in [0, 1).
    strength: fraction of the steps taken when starting from an image.
    style_fraction: weight of the style prompt's prediction, in [0, 1].
    grid: how a number of steps is spaced, a `Schedule.timestep_spacing`; None
      is the stage's. 'trailing' begins with the noisiest step.
  """

  sampler: str = 'ddpm'
  steps: int | str = 100
  guidance: float = 7.0
  aug_level: float = 0.0
  strength: float = 1.0
  style_fraction: float = 0.0
  grid: str | None = None


# Defaults of diffusers' pipelines for stages I and II; the style fractions are
# IF's.
DEFAULTS = {
  'text': (
    Settings(steps=100, guidance=7.0, style_fraction=0.25),
    Settings(steps=50, guidance=4.0, aug_level=0.25, style_fraction=0.5),
  ),
  'image': (
    Settings(steps=80, guidance=10.0, strength=0.7, style_fraction=0.25),
    Settings(
      steps=50, guidance=4.0, aug_level=0.25, strength=0.8, style_fraction=0.5
    ),
  ),
  'mask': (
    Settings(steps=50, guidance=7.0, style_fraction=0.25),
    Settings(steps=100, guidance=4.0, strength=0.8, style_fraction=0.5),
  ),
}


def choose(
  stages: Sequence[Stage], task: str, choices: Mapping[str, Any]
) -> list[Settings]:
  """`Settings` of every stage: the task's defaults, overridden by `choices`.

  Args:
    stages: the stages.
    task: 'text', 'image' or 'mask'.
    choices: {field: one value, or a list with one per stage}; None keeps the
      default.

  Raises:
    UsageError: a list has the wrong length, or a value is invalid.
  """
  names = [part.name for part in stages]
  result = []
  for part, chosen in zip(stages, batching.per_stage(choices, names)):
    default = DEFAULTS[task][int(part.upsamples)]
    setting = dataclasses.replace(default, **chosen)
    check(part, setting)
    result.append(setting)
  return result


def check(part: Stage, setting: Settings) -> None:
  """Raises a UsageError for settings that cannot work."""
  if not 0 <= setting.aug_level < 1:
    raise UsageError(
      f'stage {part.name}: aug_level is {setting.aug_level:g}; it lies in '
      '[0, 1), and 0.25 is what IF uses.',
      key='aug_level',
    )
  fraction = setting.style_fraction
  if not 0 <= fraction <= 1:
    raise UsageError(
      f'stage {part.name}: style_fraction is {fraction:g}; it lies in [0, 1].',
      key='style_fraction',
    )
  if setting.grid is not None:
    _check_grid(setting)
  plan(part, setting, from_image=True)


def _check_grid(setting: Settings) -> None:
  """Rejects a grid that does not exist or has no effect."""
  known = schedule.CHOICES['timestep_spacing']
  check_choice('grid', setting.grid, known, key='grid')
  own = isinstance(setting.steps, str) and not setting.steps.isdigit()
  if own or setting.sampler == 'dpmpp':
    raise UsageError(
      'grid has no effect with sampler dpmpp or named steps, which have a '
      'spacing of their own.',
      key='grid',
    )


def plan(part: Stage, setting: Settings, from_image: bool) -> schedule.Plan:
  """The steps of a stage, fewer if it starts from an image.

  Raises:
    UsageError: the steps or the sampler do not exist.
  """
  made = part.schedule
  if setting.grid is not None:
    made = dataclasses.replace(made, timestep_spacing=setting.grid)
  steps = schedule.timesteps(made, setting.steps, setting.sampler)
  if from_image:
    steps = schedule.later(steps, setting.strength)
  return schedule.plan(part.schedule, steps, setting.sampler)


def scalars(part: Stage, setting: Settings) -> dict[str, Any]:
  """The scalars of `SampleInputs` from a stage's settings."""
  result: dict[str, Any] = {
    'guidance': np.float32(setting.guidance),
    'mixer': np.float32(setting.style_fraction),
  }
  if part.noising is not None:
    level = min(round(setting.aug_level * 1000), 999)
    result |= noise_terms(part.noising, level)
  return result
