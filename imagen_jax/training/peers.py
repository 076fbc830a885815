"""The processes of a job fail together.

A process that fails says why in the key-value store of jax's coordination
service, which process 0 holds. A thread of every process looks there once a
second. It ends its process with that sentence and exit code, even when the main
thread waits for ever in a collective that the failed process never enters.
"""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
from jax._src import distributed  # jax has no public key-value store

from imagen_jax.errors import ImagenError
from imagen_jax.training.watchdog import EXIT_CODE

POLL = 1.0  # seconds between two looks at the store
LEAVE = 3.0  # seconds in which the main thread may end by itself
LAST = 5.0  # seconds that process 0 waits for the others at its end
AGREE = 5.0  # seconds in which the others answer
_ROOT = 'imagen_jax'


@dataclasses.dataclass(frozen=True)
class Failure:
  """Why a process ends, and the others with it.

  Attributes:
    process: its number.
    host: its machine's name.
    sentence: what happened.
    exit_code: of all processes.
    after: the step that all processes save before they end; None: there is
      none.
  """

  process: int
  host: str
  sentence: str
  exit_code: int
  after: int | None = None


class PeerError(ImagenError):
  """Another process of the job has failed; the exit code is that process's."""

  def __init__(self, failure: Failure):
    saved = '' if failure.after is None else f' after step {failure.after}'
    super().__init__(
      f'process {failure.process} on host {failure.host} failed{saved}: '
      f'{failure.sentence}'
    )
    self.failure, self.exit_code = failure, failure.exit_code


def describe(error: BaseException) -> tuple[str, int]:
  """(sentence, exit code) of an error."""
  text = ' '.join(str(error).split())[:500]
  if isinstance(error, ImagenError):
    return text, error.exit_code
  return f'{type(error).__name__}: {text}', 1


class Peers:
  """The other processes of this job; none in a job of one process.

  Inside the `with` block an exception of one process reaches all of them.
  """

  def __init__(
    self,
    describe: Callable[[BaseException], tuple[str, int]] = describe,
    *,
    joins: bool = False,
  ) -> None:
    """Does nothing yet.

    Args:
      describe: error -> (sentence, exit code).
      joins: whether this process joins the others inside the block.
    """
    self._joins = joins
    self._busy: Callable[[], bool] = lambda: False
    self._where: Callable[[], str] = lambda: 'the start'
    self._describe = describe
    self._job: Any = None
    self._failure: Failure | None = None
    self._stop: Failure | None = None
    self._left = threading.Event()
    self._aborts = False

  def __enter__(self) -> Self:
    _current.append(self)
    self._job = distributed.global_state
    if self._client is not None or self._joins:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
    _current.remove(self)
    try:
      if error is not None:
        self.raise_for(error)
    finally:
      self._left.set()
      if self._failure is not None:
        # Before jax's own handler, which waits for all processes.
        atexit.register(self._end, self._failure)

  def raise_for(self, error: BaseException) -> None:
    """Tells the others of an error of this process.

    Raises:
      PeerError: another process had failed before; what is raised here is
        often only the end of a collective with it.
      ImagenError: in the place of an error of jax, if another process is gone
        without a word.
    """
    if isinstance(error, PeerError):
      self._failure = error.failure
    if self._client is None or isinstance(error, PeerError):
      return
    gone = _gone(error)
    if self._failure is None:
      sentence, code = self._describe(gone or error)
      self._say('failed', self._failure_of(sentence, code))
      self._look()
    if self._failure is not None and self._failure.process != self._me:
      raise PeerError(self._failure) from error
    if gone:
      raise gone from error

  @contextlib.contextmanager
  def told(
    self, *, busy: Callable[[], bool], where: Callable[[], str]
  ) -> Iterator[None]:
    """Tells the others of an error before the blocks around are left.

    Leaving them may wait for the others, which wait for this process.

    Args:
      busy: whether a save is in progress; the processes do not end in it.
      where: what the main thread does, for the messages of `abort`.
    """
    self._busy, self._where = busy, where
    try:
      yield
    except BaseException as error:
      self.raise_for(error)
      raise

  def stop_after(self, step: int, error: Exception) -> None:
    """Makes all processes save and stop after `step`, because of an error.

    The others must not be able to have dispatched `step` yet. Once this
    returns, they know.

    Raises:
      Exception: `error` itself, if another process stops the run already, or
        the others do not answer in time.
    """
    if self._client is None:
      return
    sentence, code = self._describe(error)
    stop = self._failure_of(sentence, code, after=step)
    self._say('stop', stop)
    deadline = time.monotonic() + AGREE
    while time.monotonic() < deadline:
      self._look()
      if self._stop != stop:
        break
      if len(self._read('knows')) == self._job.num_processes:
        return
      time.sleep(0.05)
    raise error

  def stops_after(self, step: int) -> bool:
    """Whether all processes save and stop after `step`."""
    return self._stop is not None and self._stop.after == step

  def check(self) -> None:
    """Raises what another process has failed with.

    Raises:
      PeerError: if one has.
    """
    if self._failure is not None and self._failure.process != self._me:
      raise PeerError(self._failure)

  def check_stop(self, step: int) -> None:
    """`check`, after a step that is the one of another's `stop_after`."""
    stop = self._stop
    if stop and stop.after == step and stop.process != self._me:
      raise PeerError(stop)

  def abort(self, sentence: str) -> None:
    """Ends this process, then the others; what hangs here is left behind.

    Names the processes that do not answer, or else are elsewhere.
    """
    print('error: ' + sentence, file=sys.stderr, flush=True)
    self._aborts = True
    if self._client is not None:
      _exit_in(LAST + 5 * POLL, EXIT_CODE)  # process 0 may not answer
      found = ['without an answer: process 0.']
      seeking = threading.Thread(target=lambda: found.append(self._stray()))
      seeking.daemon = True
      seeking.start()
      seeking.join(4 * POLL)
      print(f'note: {found[-1]}', file=sys.stderr, flush=True)
      sentence = f'{sentence} Found {found[-1]}'
    failure = self._failure_of(sentence, EXIT_CODE)
    if self._client is not None:
      self._say('failed', failure)
    self._end(failure)

  def _stray(self) -> str:
    """Which processes do not answer, or do something else than this one."""
    before = self._read('at')
    time.sleep(2.5 * POLL)
    at = self._read('at')
    if self._failure is not None:  # of another: that is why it is silent
      return str(PeerError(self._failure))

    def named(wanted: Callable[[str], bool]) -> str:
      hosts = {i: json.loads(text) for i, text in at.items() if wanted(i)}
      lines = [f'process {i} on host {h[1]} ({h[2]})' for i, h in hosts.items()]
      return ', '.join(lines[:4])

    mine = self._where()
    if silent := named(lambda i: before.get(i) == at[i]):
      return f'without an answer: {silent}.'
    if away := named(lambda i: json.loads(at[i])[2] != mine):
      return f'elsewhere: {away}.'
    return 'all processes answer.'

  # In the background.

  def _watch(self) -> None:
    """Waits for a failure, then until the main thread has left."""
    counter = itertools.count()
    while self._failure is None:
      if self._client is not None:
        at = json.dumps([next(counter), socket.gethostname(), self._where()])
        self._write(f'at/{self._me}', at, again=True)
      if self._left.wait(POLL):
        return
      if self._client is not None:
        self._look()
    failure, deadline = self._failure, time.monotonic() + LEAVE
    while time.monotonic() < deadline:
      if self._left.wait(0.1) or self._aborts:
        return
      if self._busy() and str(failure.process) not in self._read('left'):
        # The failed process finishes its part of the save as well.
        deadline = time.monotonic() + LEAVE
    error = PeerError(failure)
    sentence = failure.sentence if failure.process == self._me else str(error)
    print('error: ' + sentence, file=sys.stderr, flush=True)
    self._end(failure)

  def _look(self) -> None:
    """Reads what the processes have said."""
    said = self._read('said')
    if 'stop' in said and self._stop is None:
      self._stop = Failure(**json.loads(said['stop']))
      self._write(f'knows/{self._me}', '')
    if 'failed' in said and self._failure is None:
      self._failure = Failure(**json.loads(said['failed']))

  def _end(self, failure: Failure) -> None:
    """Ends the process; process 0, which holds the store, as the last one.

    When it ends, jax aborts those that are left.
    """
    if self._client is not None:
      _exit_in(LAST + 1, failure.exit_code)  # process 0 may not answer
      self._write(f'left/{self._me}', '')
      deadline = time.monotonic() + LAST
      while self._me == 0 and time.monotonic() < deadline:
        if len(self._read('left')) == self._job.num_processes:
          time.sleep(0.5)
          break
        time.sleep(0.1)
    sys.stdout.flush()
    os._exit(failure.exit_code)

  # The store.

  @property
  def _client(self) -> Any:
    """Of the store; None before it can be used, and in a job of one process."""
    ready = self._job and self._job.preemption_sync_manager is not None
    return self._job.client if ready else None

  @property
  def _me(self) -> int:
    # Not jax.process_index, which starts the devices.
    return self._job.process_id if self._job else 0

  def _failure_of(
    self, sentence: str, exit_code: int, *, after: int | None = None
  ) -> Failure:
    host = socket.gethostname()
    return Failure(self._me, host, sentence, exit_code, after)

  def _say(self, name: str, failure: Failure) -> None:
    """Writes a failure, unless there is one: the first is the cause."""
    self._write(f'said/{name}', json.dumps(dataclasses.asdict(failure)))

  def _write(self, key: str, value: str, *, again: bool = False) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f'{_ROOT}/{key}', value, again)

  def _read(self, folder: str) -> dict[str, str]:
    try:
      found = self._client.key_value_dir_get(f'{_ROOT}/{folder}/')
    except jax.errors.JaxRuntimeError:  # process 0 is gone: jax ends this one
      return {}
    return {key.rpartition('/')[2]: value for key, value in found}


def _gone(error: BaseException) -> ImagenError | None:
  """The error to show where a collective failed with a process that is gone."""
  if not isinstance(error, jax.errors.JaxRuntimeError):
    return None
  reason = str(error).splitlines()[0][-200:]
  if 'by peer' not in reason:
    return None
  return ImagenError(
    f'another process of the job is gone ({reason}); look at its output, then '
    'run the same command again, which resumes from the last checkpoint.'
  )


def _exit_in(seconds: float, code: int) -> None:
  timer = threading.Timer(seconds, os._exit, (code,))
  timer.daemon = True
  timer.start()


_current: list[Peers] = [Peers()]


def current() -> Peers:
  """The `Peers` whose block this is; outside of any, those of one process."""
  return _current[-1]
