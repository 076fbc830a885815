"""How IF's stages are sampled: its defaults, and what a caller changes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.cascade import batching
from imagen_jax.deepfloyd import schedule
from imagen_jax.deepfloyd.stage import Stage, noise_terms
from imagen_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Settings:
  """How one stage is sampled; every field can be chosen at call time.

  Attributes:
    sampler: 'ddpm', 'ddim' or 'dpmpp'.
    steps: a number, a respacing's name, or its string.
    guidance: w; up to 1 is none.
    aug_level: noise on the upsampled image, in [0, 1).
    strength: fraction of the steps taken when starting from an image.
    style_fraction: of the style prompt's prediction in the whole.
  """

  sampler: str = 'ddpm'
  steps: int | str = 100
  guidance: float = 7.0
  aug_level: float = 0.0
  strength: float = 1.0
  style_fraction: float = 0.0


# What diffusers' pipelines do when not told, stage I and stage II; the style
# fractions are IF's own.
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
  """`Settings` of every stage: the task's defaults, changed by `choices`.

  Args:
    stages: the stages.
    task: 'text', 'image' or 'mask'.
    choices: {field: one value, or a list with one per stage}; None changes
      nothing.

  Raises:
    UsageError: a list of another length, or a value that cannot work.
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
  """Refuses settings that cannot work, in one sentence each."""
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
  plan(part, setting, from_image=True)


def plan(part: Stage, setting: Settings, from_image: bool) -> schedule.Plan:
  """The steps that a stage runs, fewer when starting from an image.

  Raises:
    UsageError: there are no such steps, or no such sampler.
  """
  steps = schedule.timesteps(part.schedule, setting.steps, setting.sampler)
  if from_image:
    steps = schedule.later(steps, setting.strength)
  return schedule.plan(part.schedule, steps, setting.sampler)


def scalars(part: Stage, setting: Settings) -> dict[str, np.float32]:
  """The scalars of `SampleInputs` that a stage's settings say."""
  result = {
    'guidance': np.float32(setting.guidance),
    'mixer': np.float32(setting.style_fraction),
  }
  if part.upsamples:
    level = min(round(setting.aug_level * 1000), 999)
    result |= noise_terms(part.noising, level)
  return result
