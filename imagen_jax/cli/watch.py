"""imagen-watch: one table over running trainings, read from their files."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from imagen_jax.cli import errors
from imagen_jax.errors import UsageError
from imagen_jax.io.paths import user_path

COLUMNS = (
  *('run', 'step', 'loss', 'images/s', 'MFU', 'goodput', 'left'),
  *('checkpoint', 'last seen'),
)
TAIL = 2**16  # bytes of metrics.jsonl, of which the last line is read
CLEAR = '\x1b[H\x1b[2J'
NONE, FINISHED = '–', 'finished'


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _main(argv: list[str]) -> None:
  parser = errors.Parser(
    prog='imagen-watch',
    description='Show the state of trainings, until all of them have ended. '
    'Only reads their files: it can run anywhere that sees the workdirs.',
  )
  parser.add_argument('workdirs', nargs='+', type=user_path, help='of the runs')
  parser.add_argument('--once', action='store_true', help='print and stop')
  parser.add_argument(
    '--every', type=errors.positive, default=10, help='seconds between looks'
  )
  args = parser.parse_args(argv)
  errors.catch_interrupts()

  from imagen_jax.io import bucket

  folders = [bucket.at(path, key='workdirs') for path in args.workdirs]
  for folder in folders:
    if not (folder / 'config.json').exists():
      raise UsageError(
        f'{folder} is no workdir of a training: it has no config.json; check '
        'the path, or start the run first.'
      )
  clear = CLEAR if sys.stdout.isatty() and not args.once else ''
  while True:
    rows = [look(folder) for folder in folders]
    print(clear + '\n'.join(table(rows)), flush=True)
    if args.once or all(row['last seen'] == FINISHED for row in rows):
      return
    time.sleep(args.every)


def look(workdir: pathlib.Path) -> dict[str, str]:
  """The state of one run: {one of `COLUMNS`: text}.

  Raises:
    ModelError: its config.json or goodput.json cannot be read.
  """
  from imagen_jax.io import manifest, model_folder
  from imagen_jax.training import ledger

  config = model_folder.load_config(workdir)['config']
  train = config['train']
  folder = model_folder.checkpoint_folder(workdir, config)
  last, total = last_line(workdir / 'metrics.jsonl'), train['num_steps']
  step, rate = last.get('step', 0), last.get('images_per_sec')
  account, goodput, seen = workdir / ledger.FILE, None, NONE
  if account.exists():  # newer than the last line, and there before the first
    record = ledger.load(account)
    goodput = ledger.goodput(record['seconds'])
    seen = ledger.duration(max(0, time.time() - record['time'])) + ' ago'
  left = (total - step) * train['batch_size'] / rate if rate else None
  return {
    'run': str(workdir),
    'step': f'{step}/{total}',
    'loss': _number(last.get('loss'), '{:.4g}'),
    'images/s': _number(rate, '{:.1f}'),
    'MFU': _number(last.get('mfu_percent'), '{:.1f} %'),
    'goodput': _number(goodput, '{:.1f} %'),
    'left': NONE if left is None else ledger.duration(left),
    'checkpoint': str(next(manifest.whole_steps(folder), NONE)),
    'last seen': FINISHED if step >= total else seen,
  }


def last_line(path: pathlib.Path) -> dict[str, Any]:
  """The last whole line of metrics; {} if there is none yet."""
  if not path.exists():
    return {}
  with path.open('rb') as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    lines = file.read().split(b'\n')
  for line in reversed(lines):
    try:
      row = json.loads(line)
      if isinstance(row['step'], int):
        return row
    except (ValueError, KeyError, TypeError):  # being written
      continue
  return {}


def table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
  """The rows under `COLUMNS`, aligned, as lines."""
  cells = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells)]
  for first, *rest in cells:
    line = [first.ljust(widths[0])]
    line += [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
    yield '  '.join(line)


def _number(value: Any, form: str) -> str:
  return NONE if value is None else form.format(value)


if __name__ == '__main__':
  sys.exit(main())
