"""Progress of a long job: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator

_silent = False  # in processes whose progress another one shows
WIDTH = 30
EVERY = 10.0  # seconds between plain lines


@contextlib.contextmanager
def silenced() -> Iterator[None]:
  """Within it no new `Progress` is shown."""
  global _silent
  before, _silent = _silent, True
  try:
    yield
  finally:
    _silent = before


class Progress:
  """Counts up to `total`; a job of under two seconds prints nothing.

  Args:
    label: of the line.
    total: number of items.
  """

  def __init__(self, label: str, total: int) -> None:
    self._label, self._total = label, total
    self._bar = sys.stderr.isatty()
    self._start = time.monotonic()
    self._done, self._next = 0, self._start + 2
    self._shown, self._silent = False, _silent

  def add(self, number: int = 1) -> None:
    """Counts `number` more items."""
    self.at(self._done + number, self._total)

  def at(self, done: int, total: int) -> None:
    """Sets how many are done, and of how many, which may be an estimate."""
    self._done, self._total = done, total
    now = time.monotonic()
    if now >= self._next and not self._silent:
      self._next = now + (0.2 if self._bar else EVERY)
      self._show(now)

  def close(self) -> None:
    """Prints the last line, if any was printed before."""
    if self._shown:
      self._show(time.monotonic())
      if self._bar:
        sys.stderr.write('\n')

  def _show(self, now: float) -> None:
    self._shown = True
    rate = self._done / max(now - self._start, 1e-9)
    left = int((self._total - self._done) / max(rate, 1e-9))
    text = (
      f'{self._label} {self._done}/{self._total}  {rate:.0f}/s  '
      f'{left // 3600}h{left // 60 % 60:02d}m{left % 60:02d}s left'
    )
    if self._bar:
      full = WIDTH * self._done // max(self._total, 1)
      text = f'\r{text}  [{"#" * full}{"." * (WIDTH - full)}]'
    else:
      text += '\n'
    sys.stderr.write(text)
    sys.stderr.flush()
