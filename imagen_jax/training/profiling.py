"""A profile of a few steps in the middle of a run."""

import pathlib
import tempfile
from typing import Any, Self

import jax

from imagen_jax.io import bucket, files

NUM_STEPS = 5


class Profiler:
  """Traces `NUM_STEPS` steps into a directory (view it with XProf).

  Args:
    at: the first step to trace; None traces none.
    directory: where the trace is written.
  """

  def __init__(self, at: int | None, directory: pathlib.Path):
    self._first, self._directory = at, directory
    self._last = None if at is None else at + NUM_STEPS - 1
    self._running = False
    self._local = directory
    if bucket.is_bucket(directory):  # jax writes to local folders only
      self._local = pathlib.Path(tempfile.mkdtemp(prefix='imagen_profile_'))

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    if self._running:
      self._stop()

  def before(self, step: int) -> None:
    """Called before each step."""
    if step == self._first:
      jax.profiler.start_trace(str(self._local))
      self._running = True

  def after(self, step: int, state: Any) -> None:
    """Called after each step, with its result."""
    if self._running and step == self._last:
      jax.block_until_ready(state)  # the trace must hold the whole step
      self._stop()

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    self._running = False
    if self._local != self._directory:
      for name in files.tree(self._local):
        whole = (self._local / name).read_bytes()
        files.write_bytes(self._directory / name, whole)
