"""The flags of sampling: one value, or a list with one value per stage."""

import argparse
from collections.abc import Iterable
from typing import Any

from imagen_jax.errors import UsageError

# Fields of `SamplingConfig`: the type of a value, and the flag's help. A tuple
# is numbers separated by colons.
PER_STAGE = {
  'sampler': (str, 'such as ddpm, ddim, dpmpp or dpmpp_sde'),
  'steps': (int, 'network evaluations'),
  'guidance': (float, 'w in w·cond + (1−w)·uncond; 1 is none'),
  'aug_level': (float, 'noise on the low-resolution input, 0 to 1'),
  'strength': (float, 'noise added to --init_image, above 0, up to 1'),
  'threshold': (str, 'dynamic, static or none'),
  'grid': (str, 'space the steps evenly in time or in logsnr; of IF, trailing'),
  'guidance_interval': (tuple, 'guide at these log-SNRs only, as =-3:5'),
  'guidance_schedule': (tuple, 'factors of w−1 from noise to image, as 0:1'),
  'guidance_rescale': (float, 'fraction of the contrast to restore, 0 to 1'),
  'apg_eta': (float, 'fraction of guidance along the image, 0 to 1'),
  'apg_norm': (float, 'limit on the norm of guidance, above 0'),
  'apg_momentum': (float, 'of guidance from step to step; best below 0'),
  'autoguidance': (float, 'w in w·x+(1−w)·x_weak, with --weak_model'),
}
# Those of them that are not strings and can be 'none'.
NULLABLE = ('guidance_interval', 'guidance_schedule', 'apg_norm')


def add_flags(
  parser: argparse.ArgumentParser, names: Iterable[str] = tuple(PER_STAGE)
) -> None:
  """Adds the flags of some of `PER_STAGE`."""
  for name in names:
    parser.add_argument(f'--{name}', help=PER_STAGE[name][1])


def choices(
  args: argparse.Namespace, names: Iterable[str] = tuple(PER_STAGE)
) -> dict[str, Any]:
  """{name: value of its flag, parsed by `per_stage`}."""
  return {name: per_stage(name, getattr(args, name)) for name in names}


def per_stage(name: str, text: str | None) -> Any:
  """'32,16,8' as [32, 16, 8], '32' as 32, None as None.

  Args:
    name: of the flag; one that is not in `PER_STAGE` holds floats.
    text: the value on the command line; 'none' stays a string.

  Raises:
    UsageError: a value is not of the flag's type.
  """
  if text is None:
    return None
  kind, _ = PER_STAGE.get(name, (float, ''))
  try:
    values = [_value(name, kind, part) for part in text.split(',')]
  except ValueError as error:
    what = {
      int: 'whole numbers such as 32,16,8',
      tuple: 'numbers separated by colons such as 0:0.5:1',
    }.get(kind, 'numbers such as 3,2,1')
    raise UsageError(
      f'{text} is not understood; give {what}.', key=name
    ) from error
  return values[0] if len(values) == 1 else values


def _value(name: str, kind: type, text: str) -> Any:
  if text == 'none' and name in NULLABLE:
    return text
  if kind is tuple:
    return tuple(float(part) for part in text.split(':'))
  return kind(text)


def names(text: str) -> tuple[str, ...]:
  """'base,sr1' as a tuple; the `type` of a flag."""
  return tuple(text.split(','))
