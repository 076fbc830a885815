"""A folder of a bucket that one job at a time writes to.

A bucket has no locks, but makes an object only where there is none. Whoever
made it rewrites it every `BEAT` seconds. A lock that has not changed for
`STALE` seconds of the waiting process's own clock was left by a process that
was killed; no two clocks are compared.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from imagen_jax.errors import UsageError
from imagen_jax.io import bucket

BEAT, STALE = 10.0, 40.0


@contextlib.contextmanager
def locked(folder: str, *, name: str, key: str | None = None) -> Iterator[None]:
  """Keeps other processes out of a folder of a bucket.

  A process whose lock was taken over, because it stood still for long, ends.

  Args:
    folder: gs://….
    name: of the lock's object, which is removed at the end.
    key: of the error, see `UsageError`.

  Raises:
    UsageError: another process holds the lock.
  """
  lock = _Lock(f'{folder.rstrip("/")}/{name}')
  lock.acquire(key)
  ended = threading.Event()
  beats = threading.Thread(target=lock.keep, args=(ended,), daemon=True)
  beats.start()
  try:
    yield
  finally:
    ended.set()
    beats.join()
    lock.release()


def owner(path: str) -> str | None:
  """Owner and token of a lock; None if there is none."""
  body = _Lock(path).read()
  return None if body is None else f'{body.get("owner")} {body.get("token")}'


class _Lock:
  """The object of a lock: {owner, token, machine, process, beat}."""

  def __init__(self, path: str):
    self._path, self._bucket = path, bucket.filesystem(path)
    self._body: dict[str, Any] = {
      'owner': f'process {os.getpid()} on {socket.gethostname()}',
      'token': secrets.token_hex(8),
      'machine': _machine(),
      'process': os.getpid(),
      'beat': 0,
    }

  def acquire(self, key: str | None) -> None:
    """Makes the object, or takes over one that a killed process left."""
    while not self._make(self._path):
      old = self.read()
      if old is None:  # removed meanwhile
        continue
      if not _is_dead(old):
        self._watch(old, key)
      # One process takes over this lock, the one that makes this object.
      turn = f'{self._path}.{old.get("token")}'
      if not self._make(turn):
        time.sleep(STALE)  # that process needs less, unless it was killed
      elif self.read() == old:
        self._write()
        self._remove(turn)
        return
      self._remove(turn)

  def keep(self, ended: threading.Event) -> None:
    """Rewrites the object until `ended`; ends the process if it was taken."""
    while not ended.wait(BEAT):
      with contextlib.suppress(Exception):  # the bucket may answer again
        if not self._mine():
          print(
            f'error: {self._path} was taken over while this process stood '
            'still; another job trains there now.',
            file=sys.stderr,
            flush=True,
          )
          os._exit(UsageError.exit_code)
        self._body['beat'] += 1
        self._write()

  def release(self) -> None:
    """Removes the object."""
    with contextlib.suppress(Exception):  # it goes stale instead
      if self._mine():
        self._remove(self._path)

  def _watch(self, old: dict[str, Any], key: str | None) -> None:
    """Waits until the lock is stale."""
    owner = old.get('owner', 'another process')
    print(
      f'{self._path} is held by {owner}; waiting up to {STALE:g} s to see '
      'whether it is alive',
      file=sys.stderr,
      flush=True,
    )
    end = time.monotonic() + STALE
    while time.monotonic() < end:
      time.sleep(min(1.0, STALE / 10))
      now = self.read()
      if now is None:
        return
      if now != old:
        raise UsageError(
          f'{self._path} is in use by {now.get("owner")}; wait until it ends, '
          'or choose another folder.',
          key=key,
        )

  def read(self) -> dict[str, Any] | None:
    """The object's body; None if there is none."""
    try:
      return dict(json.loads(self._bucket.cat_file(self._path)))
    except FileNotFoundError:
      return None
    except (ValueError, TypeError):
      return {}

  def _mine(self) -> bool:
    return (self.read() or {}).get('token') == self._body['token']

  def _write(self) -> None:
    self._bucket.pipe_file(self._path, json.dumps(self._body).encode())

  def _make(self, path: str) -> bool:
    """Whether there was no such object; then it is made."""
    data = json.dumps(self._body).encode()
    try:
      self._bucket.pipe_file(path, data, mode='create')
      return True
    except FileExistsError:
      return False

  def _remove(self, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      self._bucket.rm_file(path)


def _machine() -> str:
  """The machine since its start, and the processes that this one can see."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _is_dead(lock: dict[str, Any]) -> bool:
  """Whether the owner was a process of this machine that has ended."""
  if not lock.get('machine') or lock['machine'] != _machine():
    return False
  try:
    os.kill(lock['process'], 0)
  except ProcessLookupError:
    return True
  except OSError:
    pass
  return False
