"""How IF's stages generate: its defaults, and what a caller changes."""

import dataclasses

from imagen_jax.deepfloyd import schedule
from imagen_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Settings:
  """How one stage generates; every field can be chosen at call time.

  Attributes:
    sampler: 'ddpm', 'ddim' or 'dpmpp'.
    steps: a number, a respacing's name, or its string.
    guidance: w; up to 1 is none.
    aug_level: noise on the upsampled image, in [0, 1).
    strength: fraction of the steps taken when starting from an image.
    mixer: fraction of the style prompt's prediction.
  """

  sampler: str = 'ddpm'
  steps: int | str = 100
  guidance: float = 7.0
  aug_level: float = 0.0
  strength: float = 1.0
  mixer: float = 0.0


# What diffusers' pipelines do when not told, stage I and stage II; the mixers
# are IF's own.
DEFAULTS = {
  'text': (
    Settings(steps=100, guidance=7.0, mixer=0.25),
    Settings(steps=50, guidance=4.0, aug_level=0.25, mixer=0.5),
  ),
  'image': (
    Settings(steps=80, guidance=10.0, strength=0.7, mixer=0.25),
    Settings(steps=50, guidance=4.0, aug_level=0.25, strength=0.8, mixer=0.5),
  ),
  'mask': (
    Settings(steps=50, guidance=7.0, mixer=0.25),
    Settings(steps=100, guidance=4.0, strength=0.8, mixer=0.5),
  ),
}


def choose(stages, task, choices):
  """`Settings` of every stage: the task's defaults, changed by `choices`.

  Args:
    stages: `stage.Stage`s.
    task: 'text', 'image' or 'mask'.
    choices: {field: one value, or a list with one per stage}; None changes
      nothing.

  Raises:
    UsageError: a list of another length, or a value that cannot work.
  """
  result = []
  for i, part in enumerate(stages):
    changes = {}
    for name, value in choices.items():
      if isinstance(value, list | tuple):
        if len(value) != len(stages):
          raise UsageError(
            f'{name} has {len(value)} values for {len(stages)} stages '
            f'({", ".join(s.name for s in stages)}); give one, or one '
            'for each.'
          )
        value = value[i]
      if value is not None:
        changes[name] = value
    setting = dataclasses.replace(
      DEFAULTS[task][int(part.upsamples)], **changes
    )
    check(part, setting)
    result.append(setting)
  return result


def check(part, setting):
  """Refuses settings that cannot work, in one sentence each."""
  if not 0 <= setting.aug_level < 1:
    raise UsageError(
      f'stage {part.name}: aug_level is {setting.aug_level:g}; it lies in '
      '[0, 1), and 0.25 is what IF uses.'
    )
  if not 0 <= setting.mixer <= 1:
    raise UsageError(
      f"stage {part.name}: the style's fraction is {setting.mixer:g}; it lies "
      'in [0, 1].'
    )
  steps = steps_of(part, setting, True)
  schedule.plan(part.schedule, steps, setting.sampler)


def steps_of(part, setting, from_image):
  """The step numbers that a stage runs, fewer when starting from an image."""
  steps = schedule.timesteps(part.schedule, setting.steps, setting.sampler)
  return schedule.later(steps, setting.strength) if from_image else steps
