"""Every combination of the settings that a sweep names."""

import itertools

from imagen_jax.cascade import settings as settings_lib
from imagen_jax.cascade.cascade import Cascade
from imagen_jax.errors import UsageError
from imagen_jax.evaluation.config import SAMPLING, EvalConfig, Value

# {one of `SAMPLING`: a value per stage}
Sampling = dict[str, list[Value]]


def points(cascade: Cascade, config: EvalConfig) -> list[tuple[str, Sampling]]:
  """[(name, settings)] of all points of a sweep, after checking them.

  A name is, for example, 'guidance=1,sr1.steps=4'. Without a sweep there is one
  point, named ''.

  Raises:
    UsageError: there is no such stage, or a value is invalid, or the negative
      prompt or the weaker model has no effect on a point.
  """
  names = [stage.name for stage in cascade.stages]
  for target in config.sweep:
    stage = target.rpartition('.')[0]
    if stage and stage not in names:
      raise UsageError(
        f'sweep names stage {stage!r}; the stages are {", ".join(names)}.',
        key='sweep',
      )
  settings = cascade.settings(**config.sampling)
  base = {
    key: [_or_none(getattr(setting, key)) for setting in settings]
    for key in SAMPLING
  }
  result, guided = [], False
  for values in itertools.product(*config.sweep.values()):
    point, sampling = dict(zip(config.sweep, values)), dict(base)
    for target, value in point.items():
      stage, _, key = target.rpartition('.')
      sampling[key] = [
        value if stage in ('', name) else old
        for name, old in zip(names, sampling[key])
      ]
    chosen = cascade.settings(**sampling)
    settings_lib.check_negative(chosen, config.negative_prompt)
    guided |= any(setting.autoguidance != 1 for setting in chosen)
    parts = (f'{target}={_name(value)}' for target, value in point.items())
    result.append((','.join(parts), sampling))
  if cascade.weak and not guided:
    raise UsageError(
      'weak_model has no effect without autoguidance other than 1.',
      key='weak_model',
    )
  return result


def _name(value: Value) -> str:
  """A value in a point's name: of a tuple, numbers separated by colons."""
  if isinstance(value, tuple):
    return ':'.join(map(_name, value))
  # 1.0 is named 1, so runs of a notebook and of a command share a name.
  return str(value).removesuffix('.0')


def _or_none(value: Value | None) -> Value:
  return 'none' if value is None else value
