"""What `accelerator.py` has measured, in a file after every row."""

import dataclasses
import pathlib
from typing import Any

from accelerator_table import table

from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import files

FULL = 'out of memory'  # how such a row's reason begins
WHAT = 'give a file that benchmarks/accelerator.py --out wrote'
Answer = dict[str, Any]


@dataclasses.dataclass
class Results:
  """The rows that were measured, in a file after every row.

  Attributes:
    path: of the file; None keeps them in memory.
    rehearsal: whether the work is tiny.
    machine: what the processes say of the device.
    rows: {name: numbers, or `left_out`}.
  """

  path: pathlib.Path | None
  rehearsal: bool = False
  machine: Answer = dataclasses.field(default_factory=dict)
  rows: dict[str, Answer] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    """Reads the file of an earlier call.

    Raises:
      UsageError: it is a rehearsal's and this is none, or the reverse.
    """
    if self.path is None or not self.path.exists():
      return
    before = read(self.path)
    if before['rehearsal'] != self.rehearsal:
      raise UsageError(
        f'{self.path} is a {"rehearsal" if before["rehearsal"] else "device"}'
        "'s; give another file.",
        key='out',
      )
    self.machine, self.rows = before['machine'], before['rows']

  def done(self, name: str) -> bool:
    """Whether measuring a row again would give nothing new."""
    if name not in self.rows:
      return False
    return self.rows[name].get('left_out', FULL).startswith(FULL)

  def add(self, name: str, answer: Answer) -> None:
    """Prints a row, and writes all; one left out replaces no numbers."""
    before = self.rows.get(name, {'left_out': ''})
    if 'left_out' in before or 'left_out' not in answer:
      self.rows[name] = answer
    print(table({name: answer}), flush=True)
    if self.path is not None:
      whole = {
        'rehearsal': self.rehearsal,
        'machine': self.machine,
        'rows': self.rows,
      }
      files.write_json(self.path, whole)

  def on(self, machine: Answer) -> None:
    """Takes what a process says of the device.

    Raises:
      UsageError: the file has rows of another.
    """
    before = self.machine.get('device', machine['device'])
    if self.rows and before != machine['device']:
      raise UsageError(
        f'{self.path} has rows of {before}, and this is {machine["device"]}; '
        'give another file.',
        key='out',
      )
    self.machine = machine


def read(path: pathlib.Path) -> Answer:
  """An earlier call's file.

  Raises:
    DataError: it is none.
  """
  whole = files.read_json(
    path, error=DataError, advice='measure again', missing=WHAT
  )
  if not {'rehearsal', 'machine', 'rows'} <= whole.keys():
    raise DataError(f'{path} is another file; {WHAT}.')
  return whole


def described(results: Results) -> str:
  """The machine, then all rows, as Markdown."""
  m = results.machine
  where = 'A rehearsal with tiny work: ' if results.rehearsal else ''
  if m:
    where += (
      f'{m["device"]}, {m["gib"]:.1f} GiB for jax, {m["cores"]} CPU cores, '
      f'jax {m["jax"]}, {m["runtime"]}'
    )
  return f'{where}\n\n{table(results.rows)}'
