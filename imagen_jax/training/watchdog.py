"""Ends a run that hangs, with all stacks, a message and an exit code.

When a host of a job dies, its heartbeats stop and jax ends the others. A host
or device that hangs while its heartbeats continue would block the job for
ever; only the time since something happened shows it.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

EXIT_CODE = 1
_STDERR = 2  # its number: sys.stderr may be no file


class Watchdog:
  """Ends the process when nothing has happened for a while.

  The clock runs until the `with` block is left, so the limit of a step must be
  longer than a preview or the slowest checkpoint, and that of a phase longer
  than the slowest compilation.
  """

  def __init__(
    self,
    startup: float,
    step: float = 0.0,
    *,
    end: Callable[[str], None] | None = None,
  ):
    """Sets the limits, in seconds; 0 is none.

    Args:
      startup: of each phase before the first step, which it includes.
      step: of each step after that.
      end: called with the message, after the stacks of all threads are on
        stderr; by default it is printed and the process ends without clean-up,
        which would hang as well.
    """
    self._startup, self._step = startup, step
    self._end = end or _end
    self._left = threading.Event()
    self.phase('starting')

  def __enter__(self) -> Self:
    threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._left.set()

  def phase(self, name: str) -> None:
    """Begins a phase before the first step, such as 'restoring'."""
    self._now = time.monotonic(), self._startup, name

  def beat(self, step: int) -> None:
    """Records that `step` was dispatched to the devices."""
    self._now = time.monotonic(), self._step, f'the step after {step}'

  def where(self) -> str:
    """The phase or the step that is watched."""
    return self._now[2]

  def _watch(self) -> None:
    limits = [limit for limit in (self._startup, self._step) if limit]
    while limits and not self._left.wait(min(*limits, 100.0) / 10):
      begin, limit, name = self._now
      if limit and time.monotonic() - begin > limit:
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        key = 'hang' if name.startswith('the step') else 'startup'
        self._end(
          f'{name} has taken more than {limit:g} s (train.{key}_seconds): a '
          'device or another process hangs; look at the stacks above and at '
          'the other processes, then run the same command again, which resumes '
          'from the last checkpoint.'
        )
        return


def _end(sentence: str) -> None:
  print('error: ' + sentence, file=sys.stderr, flush=True)
  os._exit(EXIT_CODE)
