"""Where the wall time of a run goes, over all its restarts."""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

from imagen_jax.errors import ModelError
from imagen_jax.io import files

FILE, FORMAT_VERSION = 'goodput.json', 1
# {part of the wall time: what it is}; the parts add up to the wall time.
PARTS = {
  'step': 'training steps that the run has kept',
  'data_wait': 'the devices wait for a batch',
  'compile': 'tracing, compilation and the first step of each start',
  'eval': 'held-out loss and previews',
  'save': 'saving checkpoints, as far as training waits for it',
  'restore': 'restoring a checkpoint',
  'init': 'the rest of each start, and parameters of a new run',
  'redone': 'steps after the checkpoint that a restart resumed from',
  'down': 'between the last sign of life and the next start',
  'other': 'writing metrics, checks and the end',
}
# Lost with the steps that a restart repeats.
LOST = ('step', 'data_wait', 'eval')
INTERVAL = 10.0  # seconds between two signs of life


class Ledger:
  """Adds up the seconds of each of `PARTS`; each moment belongs to one part.

  Process 0 keeps it in the workdir, for the next start. What a
  killed process did after its last sign of life counts as down.

  Attributes:
    seconds: {part: seconds} up to the last change of part.
    starts: how often the run was started.
    finished: whether the run has ended, so that what follows is not 'down'.
  """

  def __init__(self, began: float | None = None):
    """Begins with 'init'.

    Args:
      began: `time.time()` of the start of the process; None means now.
    """
    now = time.time()
    self._began = now if began is None else began
    self._since = time.perf_counter() - (now - self._began)
    self._part, self._written = 'init', 0.0
    self._path: pathlib.Path | None = None
    self.seconds, self.starts = dict.fromkeys(PARTS, 0.0), 1
    self.finished = False

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # On a full disk, the error of the run and not that of this file is shown.
    with contextlib.suppress(*() if kind is None else (Exception,)):
      self.write()

  def resume(
    self, path: pathlib.Path | None, kept: Mapping[str, float]
  ) -> None:
    """Adds what the earlier starts took.

    Args:
      path: of the file, which this process writes; None: another does.
      kept: `read` at the step resumed from; {} of a new run.
    """
    old = dict(kept)
    if path is not None and path.exists():
      record = load(path)
      old, self.starts = record['seconds'], record['starts'] + 1
      for part in LOST:
        lost = max(0.0, old[part] - kept.get(part, 0.0))
        old[part] -= lost
        old['redone'] += lost
      if not record['finished']:
        old['down'] += max(0.0, self._began - record['time'])
    for part, seconds in old.items():
      self.seconds[part] += seconds
    self._path = path  # from here on, a damaged one has been refused
    self.write()

  def enter(self, part: str) -> str:
    """Starts another part; returns the one that ends."""
    now, ended = time.perf_counter(), self._part
    self.seconds[ended] += now - self._since
    self._since, self._part = now, part
    return ended

  @contextlib.contextmanager
  def spent(self, part: str) -> Iterator[None]:
    """The block belongs to `part`, also within one of another part."""
    before = self.enter(part)
    try:
      yield
    finally:
      self.enter(before)

  def move(self, seconds: float, source: str, target: str) -> None:
    """Moves seconds that turn out to belong to another part."""
    self.seconds[source] -= seconds
    self.seconds[target] += seconds

  def read(self) -> dict[str, float]:
    """{part: seconds} up to now, rounded."""
    self.enter(self._part)
    return {part: round(value, 3) for part, value in self.seconds.items()}

  def write(self) -> None:
    """Writes the file: a sign of life."""
    if self._path is not None:
      record: dict[str, Any] = {
        'format_version': FORMAT_VERSION,
        'time': round(time.time(), 3),
        'starts': self.starts,
        'finished': self.finished,
        'seconds': self.read(),
      }
      files.write_json(self._path, record)
      self._written = time.perf_counter()

  def keep_alive(self) -> None:
    """Writes the file if that was `INTERVAL` seconds ago."""
    if time.perf_counter() - self._written > INTERVAL:
      self.write()

  def table(self) -> Iterator[str]:
    """The parts with their shares of the wall time, as lines."""
    seconds = self.read()
    total = max(sum(seconds.values()), 1e-9)
    yield (
      f'goodput {goodput(seconds):.1f} % of {duration(total)} wall time, '
      f'{self.starts} start(s)'
    )
    for part, about in PARTS.items():
      share = 100 * seconds[part] / total
      yield f'  {part:10}{seconds[part]:12,.1f} s {share:6.1f} %  {about}'


def load(path: pathlib.Path) -> dict[str, Any]:
  """What `Ledger.write` wrote.

  Raises:
    ModelError: the file is damaged.
  """
  advice = 'remove it, and the run loses only its account of time'
  record = files.read_json(path, advice=advice, version=FORMAT_VERSION)
  seconds, numbers = record.get('seconds'), [record.get('time')]
  if isinstance(seconds, dict):
    numbers += seconds.values()
  if (
    not all(isinstance(value, (int, float)) for value in numbers)
    or not isinstance(seconds, dict)
    or seconds.keys() != PARTS.keys()
    or not isinstance(record.get('starts'), int)
    or not isinstance(record.get('finished'), bool)
  ):
    raise ModelError(f'{path} is damaged; {advice}.')
  return record


def goodput(seconds: Mapping[str, float]) -> float:
  """The fraction of the wall time that went into kept steps, in percent."""
  return 100 * seconds['step'] / max(sum(seconds.values()), 1e-9)


def duration(seconds: float) -> str:
  """Such as '2h05m' or '3m09s'."""
  minutes, rest = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{rest:02d}s'
