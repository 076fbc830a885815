"""Work shared by processes of this machine, which may be killed or stall."""

import collections
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, TypeVar

from imagen_jax.data.progress import silenced

Item = TypeVar('Item')

TRIES = 3  # processes that may die over an item
PATIENCE = 60.0  # seconds without news after which another process tries too
NEWS, DONE, DIED = 'news', 'done', 'died'


def share(
  work: Callable[..., Any],
  items: Sequence[Item],
  processes: int,
  *,
  patience: float = PATIENCE,
) -> Iterator[tuple[str, int, Any]]:
  """Calls `work(item, tell=tell)` for each item, in processes.

  An item whose process dies goes to another one. An item whose process has
  been silent for `patience` goes to another one as well, once one is free; the
  first to finish counts. So `work` must be idempotent.

  Args:
    work: picklable, as are the items; it does not raise.
    items: the items.
    processes: how many.
    patience: in seconds.

  Yields:
    (NEWS, number of an item, what `tell` was called with),
    (DONE, number, what `work` returned), or
    (DIED, number, None) after `TRIES` deaths.
  """
  pool = _Pool(work, items, processes, patience)
  try:
    yield from pool.run()
  finally:
    for worker in pool.workers:
      worker.process.kill()  # ends a stopped one too
      worker.process.join()


class _Worker:
  """A process, and the item that it works on."""

  def __init__(self, work: Callable[..., Any]) -> None:
    # Not forked: a bucket's library has threads.
    context = multiprocessing.get_context('spawn')
    self.pipe, theirs = context.Pipe()
    self.process = context.Process(
      target=_serve, args=(theirs, work), daemon=True
    )
    self.process.start()
    theirs.close()
    self.item: int | None = None
    self.heard = time.monotonic()


class _Pool:
  """The state of `share`."""

  def __init__(
    self,
    work: Callable[..., Any],
    items: Sequence[Any],
    processes: int,
    patience: float,
  ) -> None:
    self._work, self._items = work, items
    self._processes, self._patience = processes, patience
    self._waiting = collections.deque(range(len(items)))
    self._deaths = collections.Counter[int]()
    self._done: set[int] = set()
    self.workers: list[_Worker] = []

  def run(self) -> Iterator[tuple[str, int, Any]]:
    """Yields as `share` does."""
    while len(self._done) < len(self._items):
      self._assign()
      pipes = {worker.pipe: worker for worker in self.workers}
      for pipe in connection.wait([*pipes], timeout=1.0):
        worker = pipes[pipe]  # type: ignore[index]
        try:
          kind, value = worker.pipe.recv()
        except (EOFError, OSError):
          yield from self._bury(worker)
          continue
        number, worker.heard = worker.item, time.monotonic()
        assert number is not None
        if kind == DONE:
          worker.item = None
        if number not in self._done:
          if kind == DONE:
            self._done.add(number)
          yield kind, number, value

  def _assign(self) -> None:
    """Gives every idle or missing worker an item, as long as there are any."""
    idle = [worker for worker in self.workers if worker.item is None]
    while idle or len(self.workers) < self._processes:
      number = self._next()
      if number is None:
        return
      if not idle:
        self.workers.append(_Worker(self._work))
        idle.append(self.workers[-1])
      worker = idle.pop()
      worker.item, worker.heard = number, time.monotonic()
      try:
        worker.pipe.send(self._items[number])
      except OSError:
        pass  # it has died; its pipe says so in `run`

  def _next(self) -> int | None:
    """An item that waits, or else one whose only process is silent."""
    while self._waiting:
      number = self._waiting.popleft()
      if number not in self._done:
        return number
    late = time.monotonic() - self._patience
    at_work = collections.Counter(worker.item for worker in self.workers)
    silent = [
      (worker.heard, worker.item)
      for worker in self.workers
      if worker.item is not None
      and worker.item not in self._done
      and worker.heard < late
      and at_work[worker.item] == 1
    ]
    return min(silent)[1] if silent else None

  def _bury(self, worker: _Worker) -> Iterator[tuple[str, int, Any]]:
    """Removes a dead worker; its item waits again, or is given up."""
    self.workers.remove(worker)
    worker.process.join()
    worker.pipe.close()
    number = worker.item
    if number is None or number in self._done:
      return
    self._deaths[number] += 1
    if self._deaths[number] < TRIES:
      self._waiting.appendleft(number)
    else:
      self._done.add(number)
      yield DIED, number, None


def _serve(pipe: connection.Connection, work: Callable[..., Any]) -> None:
  """A worker's life: items in, results out, until the pipe is closed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers

  def tell(*news: Any) -> None:
    try:
      pipe.send((NEWS, news))
    except OSError:
      os._exit(1)  # the parent is gone

  with silenced():
    while True:
      try:
        item = pipe.recv()
      except (EOFError, OSError):
        return
      result = work(item, tell=tell)
      try:
        pipe.send((DONE, result))
      except OSError:
        return
