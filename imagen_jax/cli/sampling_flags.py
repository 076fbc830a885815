"""The flags of sampling: one value, or a list with one value per stage."""

import argparse
from collections.abc import Iterable
from typing import Any

from imagen_jax.errors import UsageError

# Fields of `SamplingConfig`: the type of a value, and the flag's help.
PER_STAGE = {
  'sampler': (str, 'such as ddpm, ddim or dpmpp'),
  'steps': (int, 'network evaluations'),
  'guidance': (float, 'w in w·cond + (1−w)·uncond; 1 is none'),
  'aug_level': (float, 'noise on the low-resolution input, 0 to 1'),
  'strength': (float, 'noise added to --init_image, above 0, up to 1'),
  'threshold': (str, 'dynamic, static or none'),
  'grid': (str, 'space the steps evenly in time or in logsnr'),
}


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
    text: the value on the command line.

  Raises:
    UsageError: a value is not of the flag's type.
  """
  if text is None:
    return None
  kind, _ = PER_STAGE.get(name, (float, ''))
  try:
    values = [kind(part) for part in text.split(',')]
  except ValueError as error:
    what = 'whole numbers' if kind is int else 'numbers'
    raise UsageError(
      f'{text} is not understood; give {what} such as '
      f'{"32,16,8" if kind is int else "3,2,1"}.',
      key=name,
    ) from error
  return values[0] if len(values) == 1 else values


def stage_names(args: argparse.Namespace) -> list[str] | None:
  """The stages that --stages names; None is all of them."""
  return None if args.stages is None else args.stages.split(',')
