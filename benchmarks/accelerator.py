r"""What one accelerator does with this project, for docs/gpu.md.

  python benchmarks/accelerator.py --out h100.json
  python benchmarks/accelerator.py --rehearse          # tiny, on a CPU
  python benchmarks/accelerator.py --out h100.json --rows t5:16 if
  python benchmarks/accelerator.py --table h100.json   # as Markdown

For one NVIDIA GPU of 80 GB or more, or one TPU chip. Nothing is downloaded:
weights, images and text embeddings are random and made on the device. Rows are

  train        steps of the paper's 64×64 and 64→256 models, as configured and
               with one change each: rematerialization, a larger batch, fused
               attention, narrow text, XLA's flags; images/s, MFU (without the
               FLOPs that rematerialization repeats), HFU, and where the time
               goes by class of operation
  sample       the three samplers, by the time of a step of theirs
  if           DeepFloyd IF's stage I, beside diffusers where it is installed
  t5           captions through T5-XXL's encoder, by length
  determinism  whether two runs agree, with and without the flags of docs/gpu.md

and are measured in order of importance until `--minutes` are over. `--out` is
written after every row. The same command again measures the rows that were left
out, and finds what was compiled in a folder beside the file, with a log. A
group of rows is a process of its own, which compiles its rows together and then
times one after the other. Nothing else should use the device.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import accelerator_rows
from accelerator_process import Processes, measure
from accelerator_results import Results, described, read
from accelerator_rows import Group

from imagen_jax.cli import errors
from imagen_jax.errors import UsageError, check_choice
from imagen_jax.io.paths import user_path

MINUTES, REHEARSAL = 8, 60  # in all, by default


def chosen(
  groups: Sequence[Group], names: Sequence[str] | None, results: Results
) -> list[Group]:
  """The groups with the rows that are to be measured.

  Args:
    groups: all.
    names: of rows; None: all that are not done.
    results: of earlier calls.

  Raises:
    UsageError: there is no row of a name.
  """
  known = [name for group in groups for name in group.rows]
  for name in names or ():
    check_choice('rows', name, known, key='rows')
  found = []
  for group in groups:
    rows = {
      name: row
      for name, row in group.rows.items()
      if (name in names if names else not results.done(name))
    }
    if rows:
      found.append(dataclasses.replace(group, rows=rows))
  return found


def main(argv: list[str]) -> None:
  parser = errors.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', nargs='+', help='these, also again; else all')
  parser.add_argument('--minutes', type=float, help=f'in all; else {MINUTES}')
  parser.add_argument('--out', type=user_path, help='JSON, added to')
  parser.add_argument('--rehearse', action='store_true', help='tiny, on a CPU')
  parser.add_argument('--table', type=user_path, help='print this JSON')
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.serve:
    importlib.import_module('accelerator_work').serve(**json.load(sys.stdin))
    return
  if args.table:
    whole = read(pathlib.Path(args.table))
    print(described(Results(None, **whole)))
    return
  minutes = args.minutes or (REHEARSAL if args.rehearse else MINUTES)
  if minutes < 0:
    raise UsageError(f'minutes is {minutes:g}; it is above 0.', key='minutes')
  results = Results(args.out and pathlib.Path(args.out), args.rehearse)
  deadline = time.monotonic() + 60 * minutes
  groups = accelerator_rows.groups()
  groups = chosen(groups, args.rows, results)
  with contextlib.ExitStack() as stack:
    if results.path is None:
      folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    else:
      folder = results.path.with_suffix('')
      folder.mkdir(parents=True, exist_ok=True)
    measure(groups, results, Processes(folder, args.rehearse, deadline))
  print(f'\n{described(results)}')


if __name__ == '__main__':
  sys.exit(errors.run(main))
