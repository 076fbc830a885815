"""Ends a run that hangs, with a message and an exit code.

When a host of a job dies, its heartbeats stop and jax ends the others. A host
or device that hangs while its heartbeats continue would block the job for
ever; only the time since the last step shows it.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

EXIT_CODE = 1


class Watchdog:
  """Ends the process when no step has finished for a while.

  The clock starts with the first `beat`, since compiling may take long. It
  runs until the `with` block is left, so the limit must be longer than a
  preview or the slowest checkpoint.
  """

  def __init__(self, limit: float, *, end: Callable[[str], None] | None = None):
    """Sets the limit.

    Args:
      limit: seconds; 0 turns the watchdog off.
      end: called with the message; by default it is printed and the process
        ends without clean-up, which would hang as well.
    """
    self._limit = limit
    self._end = end or _end
    self._last: tuple[int, float] | None = None
    self._left = threading.Event()

  def __enter__(self) -> Self:
    if self._limit:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._left.set()

  def beat(self, step: int) -> None:
    """Records that `step` was dispatched to the devices."""
    self._last = step, time.monotonic()

  def _watch(self) -> None:
    while not self._left.wait(min(self._limit / 10, 10)):
      if self._last and time.monotonic() - self._last[1] > self._limit:
        self._end(
          f'nothing has happened for {self._limit:g} s after step '
          f'{self._last[0]}: a device or another process hangs; look at the '
          'other processes, then run the same command again, which resumes '
          'from the last checkpoint (train.hang_seconds sets the limit).'
        )
        return


def _end(sentence: str) -> None:
  print('error: ' + sentence, file=sys.stderr, flush=True)
  os._exit(EXIT_CODE)
