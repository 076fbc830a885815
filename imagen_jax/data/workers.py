"""Examples that are read and decoded in worker processes.

Threads decode large images side by side. Of a small image most of the time is
Python's, which one thread of a process runs at a time.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeAlias

import cloudpickle
import grain

from imagen_jax.data.source import Source
from imagen_jax.errors import DataError, UsageError

Note: TypeAlias = tuple[int, str, str]  # number of a source, name, reason
KEY = 'config.data.workers'

_made_by: grain.MapDataset  # of a worker
_notes: list[Note] = []


class InWorkers(grain.MapDataset):
  """The elements of another data set, each made by some worker process.

  Which one makes an element does not change it. A worker ends with this
  object, and with this process, however that ends.

  Args:
    parent: the data set, which is copied to the workers.
    sources: all that it reads. What `Source.note` is told in a worker, it is
      told here.
    workers: how many processes.

  Raises:
    UsageError: a source cannot be copied.
    DataError: when indexed, if a worker has died.
  """

  def __init__(
    self, parent: grain.MapDataset, sources: Sequence[Source], workers: int
  ) -> None:
    super().__init__(parent)
    self._sources, self._workers = sources, workers
    try:
      data = cloudpickle.dumps((parent, sources))
    except Exception as error:  # whatever an object of the user's raises
      raise UsageError(
        f'data.workers={workers} needs a source that can be pickled, and this '
        f'one cannot ({error}); set data.workers=0.',
        key=KEY,
      ) from error
    self._pool = concurrent.futures.ProcessPoolExecutor(
      workers,
      multiprocessing.get_context('spawn'),  # not forked: JAX has threads
      _start,
      (data,),
    )
    weakref.finalize(self, self._pool.shutdown, False, cancel_futures=True)

  def __len__(self) -> int:
    return len(self._parent)

  def __getitem__(self, index: Any) -> Any:
    try:
      made, notes = self._pool.submit(_make, index).result()
    except BrokenProcessPool as error:
      raise DataError(
        f'one of the {self._workers} processes that read images has died, '
        'perhaps for want of memory; set data.workers to fewer, or to 0.'
      ) from error
    for number, name, reason in notes:
      self._sources[number].note(name, reason)
    return made


def _start(data: bytes) -> None:
  """The beginning of a worker's life."""
  global _made_by
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _made_by, sources = cloudpickle.loads(data)
  for number, source in enumerate(sources):
    source.note = functools.partial(_note, number)


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)


def _note(number: int, name: str, reason: str) -> None:
  _notes.append((number, name, reason))


def _make(index: int) -> tuple[Any, list[Note]]:
  """An element, and what was noted while it was made."""
  _notes.clear()
  return _made_by[index], [*_notes]
