"""The accelerators the planner knows, in one table."""

import dataclasses
import math

from imagen_jax.errors import UsageError, check_choice


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, with the figures its maker publishes.

  Attributes:
    name: as in `--chip` and before the colon of a topology.
    flops: peak FLOPs per second of dense bfloat16 matrix products.
    memory: bytes of HBM.
    bandwidth: bytes per second to and from HBM.
    link: bytes per second, in one direction, between the chip and the others
      of its pod or server.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  link: float


GIB = 2**30
# From the pages "TPU v4" to "TPU v6e" of the Cloud TPU documentation
# (docs.cloud.google.com/tpu), and from NVIDIA's datasheets of A100 80GB SXM,
# H100 SXM and H200 SXM. TPU pages give the links' bandwidth of both directions
# together; these are half of that. Their "16 GB of HBM" are 16 GiB, part of
# which the compiler reserves, see RESERVED.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v4', 275e12, 32 * GIB, 1228e9, 300e9),
    Chip('v5e', 197e12, 16 * GIB, 819e9, 200e9),
    Chip('v5p', 459e12, 95 * GIB, 2765e9, 600e9),
    Chip('v6e', 918e12, 32 * GIB, 1640e9, 400e9),
    Chip('a100', 312e12, 80e9, 2039e9, 300e9),
    Chip('h100', 989e12, 80e9, 3350e9, 450e9),
    Chip('h200', 989e12, 141e9, 4800e9, 450e9),
  )
}
# jax's device kinds; the first match counts: 'TPU v5' is in 'TPU v5 lite' too.
KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'A100': 'a100',
  'H100': 'h100',
  'H200': 'h200',
}
# Fraction of the memory that programs cannot use: the runtime takes some, and
# on a TPU the compiler.
RESERVED = 0.04
DIMENSIONS = {'v4': 3, 'v5e': 2, 'v5p': 3, 'v6e': 2}
EXAMPLES = ('v5e:4x4', 'v5e:16x16', 'v4:4x8x8', 'v5p:4x4x8', 'v6e:16x16')


def find_chip(name: str) -> Chip:
  """The chip of a name.

  Raises:
    UsageError: the name is unknown; the message lists the known ones.
  """
  check_choice('chip', name, CHIPS)
  return CHIPS[name]


def find_peak(device_kind: str) -> float | None:
  """Peak FLOPs per second of one jax device, or None if unknown.

  Args:
    device_kind: jax's name, such as 'TPU v5 lite' or 'NVIDIA H100 80GB HBM3'.
  """
  names = (name for words, name in KINDS.items() if words in device_kind)
  return next((CHIPS[name].flops for name in names), None)


def parse_topology(text: str) -> tuple[Chip, int]:
  """'v5e:16x16' -> (chip, number of chips). Shapes count chips.

  Raises:
    UsageError: an unknown chip, or a shape that it does not have.
  """
  name, _, shape = text.partition(':')
  if name not in DIMENSIONS:
    raise UsageError(
      f'topology {text!r}: chip {name!r} is unknown; write a chip and the '
      f'shape in chips, such as {", ".join(EXAMPLES)}.'
    )
  sizes = [int(size) if size.isdigit() else 0 for size in shape.split('x')]
  if min(sizes) < 1 or len(sizes) != DIMENSIONS[name]:
    example = next(e for e in EXAMPLES if e.startswith(name))
    raise UsageError(
      f'topology {text!r}: the shape of {name} is {DIMENSIONS[name]} numbers '
      f'of chips, as in {example}.'
    )
  return CHIPS[name], math.prod(sizes)


def usable(chip: Chip) -> float:
  """Bytes of one chip's memory that a program may use."""
  return chip.memory * (1 - RESERVED)
