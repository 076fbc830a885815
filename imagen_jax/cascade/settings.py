"""The sampling settings of a call: each stage's defaults and the choices."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.cascade import batching
from imagen_jax.cascade.stage import SamplingConfig, Stage
from imagen_jax.diffusion.reverse import logsnr_grid
from imagen_jax.diffusion.samplers import SAMPLERS
from imagen_jax.diffusion.settings import SettingError
from imagen_jax.errors import UsageError

# Fields that act on the guidance; without any they have no effect.
OF_GUIDANCE = (
  'guidance_interval',
  'guidance_schedule',
  'guidance_rescale',
  'apg_eta',
  'apg_norm',
  'apg_momentum',
)
# Fields that can be None, or 'none' in a choice.
NULLABLE = ('threshold', *batching.TUPLES, 'apg_norm')


def choose(
  stages: Sequence[Stage], choices: Mapping[str, Any]
) -> list[SamplingConfig]:
  """The settings of every stage: its defaults, overridden by `choices`.

  Args:
    stages: the stages.
    choices: {field: one value, or a list with one per stage}; None keeps the
      default, and 'none' is None, such as no thresholding.

  Raises:
    UsageError: a list's length is not the number of stages, or a value is
      invalid or has no effect.
  """
  names = [stage.name for stage in stages]
  result = []
  for stage, chosen in zip(stages, batching.per_stage(choices, names)):
    for name in NULLABLE:
      if chosen.get(name) == 'none':
        chosen[name] = None
    try:
      config = dataclasses.replace(stage.sampling, **chosen)
    except SettingError as error:
      raise UsageError(
        f'stage {stage.name}: {error}', key=error.field
      ) from error
    # It is given with an image, from whose time the steps then begin.
    given = chosen.get('strength') is not None
    check(stage, config, start=config.strength if given else 1.0)
    result.append(config)
  _check_effects(stages, result, choices)
  return result


def check(stage: Stage, config: SamplingConfig, start: float = 1.0) -> None:
  """Rejects settings that this stage was not trained for.

  Args:
    stage: the stage.
    config: its settings.
    start: time at which the steps begin.

  Raises:
    UsageError: guidance out of range or without caption dropout, an interval of
      guidance without a step, or an augmentation level outside [0, max_level].
  """
  for key in 'guidance', 'autoguidance':
    if not 0 <= getattr(config, key) <= float(np.finfo(np.float32).max):
      raise UsageError(
        f'stage {stage.name}: {key} is {getattr(config, key)}; it is a finite '
        f'number of at least 0, and 1 is no {key}.',
        key=key,
      )
  if config.guidance != 1 and stage.cond_drop == 0:
    raise UsageError(
      f'stage {stage.name}: guidance {config.guidance:g} needs a model trained '
      'with caption dropout, and this one had stage.cond_drop = 0; use 1.',
      key='guidance',
    )
  guided = config.guidance != 1 or config.autoguidance != 1
  if guided and config.guidance_interval is not None:
    grid = np.asarray(logsnr_grid(stage.logsnr_fn, config.spec, start=start))
    lowest, highest = config.guidance_interval
    # The network is evaluated at the start of each step, not at its end.
    if not np.any((lowest <= grid[:-1]) & (grid[:-1] <= highest)):
      raise UsageError(
        f'stage {stage.name}: guidance_interval is {lowest:g} to {highest:g}, '
        f'where none of the {len(grid) - 1} steps lies; they are at log-SNRs '
        f'of {grid[0]:.3g} to {grid[-2]:.3g}.',
        key='guidance_interval',
      )
  if not 0 <= config.aug_level <= stage.max_level:
    raise UsageError(
      f'stage {stage.name}: aug_level is {config.aug_level:g}; it lies in '
      f'[0, {stage.max_level:g}], and 0.1 to 0.3 give the best-looking '
      'images.',
      key='aug_level',
    )


def _check_effects(
  stages: Sequence[Stage],
  configs: Sequence[SamplingConfig],
  choices: Mapping[str, Any],
) -> None:
  """Rejects choices that have no effect on any stage."""
  options = {name for s in SAMPLERS.values() for name in s.options}
  for name in sorted(options.intersection(choices)):
    used = any(name in SAMPLERS[c.sampler].options for c in configs)
    if choices[name] is not None and not used:
      raise UsageError(
        f'{name} has no effect with sampler {configs[0].sampler}.', key=name
      )
  guided = any(c.guidance != 1 or c.autoguidance != 1 for c in configs)
  for name in () if guided else OF_GUIDANCE:
    if any(
      getattr(c, name) != getattr(s.sampling, name)
      for s, c in zip(stages, configs)
    ):
      raise UsageError(
        f'{name} has no effect without guidance; choose a guidance other than '
        '1, or leave it out.',
        key=name,
      )
  if choices.get('aug_level') is not None:
    upsample = any(stage.low_resolution is not None for stage in stages)
    if not upsample and any(config.aug_level for config in configs):
      raise UsageError(
        'aug_level has no effect without a super-resolution stage.',
        key='aug_level',
      )


def check_negative(configs: Sequence[SamplingConfig], prompt: str) -> None:
  """Rejects a negative prompt that has no effect on any stage.

  Raises:
    UsageError: no stage is guided by its unconditional branch.
  """
  if prompt and all(config.guidance == 1 for config in configs):
    raise UsageError(
      'the negative prompt has no effect without guidance; choose a guidance '
      'other than 1, or leave it out.',
      key='negative_prompt',
    )
