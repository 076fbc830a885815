r"""Trains the stages of a cascade one after the other, in a given time.

  python scripts/train_within.py --minutes 13 --workdir runs/icons \
      --out models/icons base=icons_base:5 sr1=icons_sr1:2 sr2=icons_sr2:3 -- \
      --config.data.things=1000 --config.data.workers=12 \
      --base.config.train.batch_size=512

For a machine that is rented by the minute. Each stage gets its share of the
time, here 5, 2 and 3 tenths, and starts `--lead` seconds before the one before
it ends, so that it compiles while the device still computes. A stage that ends
early leaves its time to the others, also if it fails. Its EMA is exported to a
folder of `--out` while the next one trains.

What follows `--` goes to train.py: `--config.…` for all stages,
`--STAGE.config.…` for one. Runs are in folders of `--workdir`, each with a log.
The same command again, with another `--out`, resumes them for as long.

The learning rate should be constant (`train.optimizer.decay=False`), since the
number of steps is not known in advance. A TPU takes one process at a time,
hence `--lead 0` there.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from imagen_jax.cli import errors
from imagen_jax.errors import UsageError
from imagen_jax.io.paths import user_path

TRAIN = (str(pathlib.Path(__file__).parents[1] / 'train.py'),)
EXPORT = ('-m', 'imagen_jax.cli.export')
# Seconds in which a stage saves its last step, and then is exported.
SAVING, EXPORTING = 60.0, 30.0
MEMORY = '0.45'  # of a GPU, for each of the two processes that overlap


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage: its name, its config, its part of the time, its arguments."""

  name: str
  config: str
  share: float
  arguments: tuple[str, ...] = ()


def parse_stage(text: str) -> Stage:
  """'base=icons_base:5' -> the stage; the share is 1 if left out.

  Raises:
    argparse.ArgumentTypeError: it is no such text.
  """
  name, _, rest = text.partition('=')
  config, _, share = rest.partition(':')
  with contextlib.suppress(ValueError):
    if name.isidentifier() and config and 0 < float(share or 1) < float('inf'):
      return Stage(name, config, float(share or 1))
  raise argparse.ArgumentTypeError(
    f'{text!r} is not NAME=CONFIG or NAME=CONFIG:SHARE, such as '
    'base=icons_base:5'
  )


def with_arguments(
  stages: Sequence[Stage], words: Sequence[str]
) -> list[Stage]:
  """The stages with those of train.py's arguments that are for each.

  Raises:
    UsageError: two stages have the same name, or an argument is for none.
  """
  names = [stage.name for stage in stages]
  if len({*names}) < len(names):
    raise UsageError(f'two stages have one name: {", ".join(names)}.')
  given: dict[str, list[str]] = {name: [] for name in names}
  for word in words:
    first, _, rest = word.removeprefix('--').partition('.')
    if first in given and rest.startswith('config.') and '=' in word:
      given[first].append(f'--{rest}')
    elif word.startswith('--config.') and '=' in word:
      for arguments in given.values():
        arguments.append(word)
    else:
      raise UsageError(
        f'{word} is neither --config.KEY=VALUE nor --STAGE.config.KEY=VALUE '
        f'of the stages {", ".join(names)}.'
      )
  return [
    dataclasses.replace(stage, arguments=tuple(given[stage.name]))
    for stage in stages
  ]


class Run:
  """A stage's training process, and its export.

  Args:
    stage: the stage.
    workdir: of its training.
    out: the folder of its weights.
  """

  def __init__(
    self, stage: Stage, workdir: pathlib.Path, out: pathlib.Path
  ) -> None:
    self.stage, self._workdir, self._out = stage, workdir, out
    workdir.mkdir(parents=True, exist_ok=True)
    self._log = (workdir / 'log.txt').open('ab')
    self._export: subprocess.Popen[bytes] | None = None
    self._error = ''  # why the training or the export failed
    self._training = self._start(
      [*TRAIN, '--config', stage.config, *stage.arguments],
      {'XLA_PYTHON_CLIENT_MEM_FRACTION': MEMORY, **os.environ},
    )

  def _start(
    self, words: Sequence[str], environment: Mapping[str, str]
  ) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
      [sys.executable, *words, '--workdir', str(self._workdir)],
      stdout=self._log,
      stderr=subprocess.STDOUT,
      env=environment,
      start_new_session=True,  # Ctrl-C is for this script alone
    )

  def ended(self) -> bool:
    """Whether its training has ended by itself."""
    return self._training.poll() is not None

  def stop(self) -> None:
    """Ends the training after its current step, which is saved."""
    if not self.ended():
      self._training.send_signal(signal.SIGINT)
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._training.wait(SAVING)
      self._training.kill()
      self._training.wait()
    # A training that is stopped ends as if by that signal.
    code = self._training.returncode
    if code not in (0, 128 + signal.SIGINT) and not self._error:
      self._error = self._last_line() or f'its training ended with {code}'

  def export(self) -> None:
    """Begins to write the weights."""
    self._export = self._start(
      [*EXPORT, '--out', str(self._out)],
      {**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )

  def report(self) -> str:
    """What became of the stage, once its export has ended, in a line."""
    assert self._export is not None
    if self._export.wait():
      self._error = self._error or self._last_line()
      return f'{self.stage.name}: no weights ({self._error})'
    size = sum(p.stat().st_size for p in self._out.rglob('*') if p.is_file())
    why = f' ({self._error})' if self._error else ''
    return f'{self.stage.name}: {self._measured()}{size / 2**20:.1f} MiB{why}'

  @property
  def failed(self) -> bool:
    """Whether the training or the export ended with an error."""
    return bool(self._error)

  def _last_line(self) -> str:
    log = (self._workdir / 'log.txt').read_text(errors='replace')
    return next((s for s in reversed(log.splitlines()) if s.strip()), '')

  def _measured(self) -> str:
    # A row without a loss has only steps that were skipped.
    known = OSError, IndexError, ValueError, KeyError, TypeError
    with contextlib.suppress(*known):
      lines = (self._workdir / 'metrics.jsonl').read_text().splitlines()
      row = [r for r in map(json.loads, lines) if 'images_per_sec' in r][-1]
      mfu = f', MFU {row["mfu_percent"]} %' if 'mfu_percent' in row else ''
      return (
        f'step {row["step"]}, loss {row["loss"]:.4f}, '
        f'{row["images_per_sec"]:.0f} images/s{mfu}, '
      )
    return ''


def train(
  stages: Sequence[Stage],
  seconds: float,
  lead: float,
  workdir: pathlib.Path,
  out: pathlib.Path,
) -> list[Run]:
  """Trains stages in turn.

  Args:
    stages: in order.
    seconds: for all of them, with the last one's export.
    lead: how many seconds earlier a stage starts than its time.
    workdir: for a folder per stage.
    out: for a folder of weights per stage.

  Returns:
    the runs, whose exports may not have ended.
  """
  end = time.monotonic() + seconds - EXPORTING
  runs: list[Run] = []

  def start(index: int) -> None:
    if len(runs) == index < len(stages):
      stage = stages[index]
      print(f'{stage.name} starts', flush=True)
      runs.append(Run(stage, workdir / stage.name, out / stage.name))

  try:
    for i, stage in enumerate(stages):
      start(i)
      now = time.monotonic()
      part = stage.share / sum(s.share for s in stages[i:])
      until = now + part * max(end - now, 0)
      while time.monotonic() < until and not runs[i].ended():
        if time.monotonic() > until - lead:
          start(i + 1)
        time.sleep(0.2)
      print(f'{stage.name} ends', flush=True)
      runs[i].stop()
      runs[i].export()
  finally:
    for run in runs:  # if this was interrupted
      run.stop()
  return runs


def main(argv: list[str]) -> int:
  """Entry point; returns the exit code."""
  parser = errors.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('stages', nargs='+', type=parse_stage, metavar='STAGE')
  parser.add_argument('--minutes', type=float, required=True, help='in all')
  parser.add_argument('--lead', type=float, default=90, help='seconds')
  parser.add_argument('--workdir', type=user_path, required=True)
  parser.add_argument('--out', type=user_path, required=True)
  split = argv.index('--') if '--' in argv else len(argv)
  args = parser.parse_args(argv[:split])
  if not args.minutes * 60 > EXPORTING:
    raise UsageError(
      f'{args.minutes} minutes are not enough: the last stage needs '
      f'{EXPORTING:.0f} seconds to be exported.',
      key='minutes',
    )
  if not args.lead >= 0:
    raise UsageError(f'{args.lead} is not a number of seconds.', key='lead')
  stages = with_arguments(args.stages, argv[split + 1 :])
  out = pathlib.Path(args.out)
  for stage in stages:
    if (out / stage.name).exists():
      raise UsageError(
        f'{out / stage.name} exists; choose another folder.', key='out'
      )
  errors.catch_interrupts()
  signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
  runs = train(
    stages,
    60 * args.minutes,
    args.lead,
    pathlib.Path(args.workdir),
    out,
  )
  for run in runs:
    print(run.report(), flush=True)
  return int(any(run.failed for run in runs))


if __name__ == '__main__':
  sys.exit(errors.run(main))
