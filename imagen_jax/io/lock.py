"""A folder that one process at a time writes to."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from imagen_jax.errors import UsageError
from imagen_jax.io import bucket, bucket_lock
from imagen_jax.io.files import AnyPath

FILE = '.lock'
# Of file systems without locks, where two at once are not noticed.
_WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(
  folder: AnyPath,
  *,
  name: str = FILE,
  wait: bool = False,
  key: str | None = None,
) -> Iterator[None]:
  """Keeps other processes out of a folder, which is made if it is missing.

  The system releases the lock when the process ends, however it ends, so the
  file that a killed process leaves does not count.

  Args:
    folder: a local path, or a bucket's; see `bucket_lock` for how it waits.
    name: of the lock's file, which is removed at the end.
    wait: for another process to release it.
    key: of the error, see `UsageError`.

  Raises:
    UsageError: another process holds the lock, or the path is that of a file.
  """
  if bucket.is_bucket(folder):
    with bucket_lock.locked(os.fspath(folder), name=name, key=key):
      yield
    return
  path = pathlib.Path(folder) / name
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as error:
    raise UsageError(
      f'{folder} is no folder: a file has that name; choose another.', key=key
    ) from error
  except FileNotFoundError as error:  # in /proc, for example
    raise UsageError(
      f'{folder} cannot be made there; choose another folder.', key=key
    ) from error
  file = _acquire(path, wait, key)
  try:
    yield
  finally:
    path.unlink(missing_ok=True)  # before the release: it is still this one's
    os.close(file)


def owner(folder: AnyPath) -> str | None:
  """Who holds a folder's lock, as its file says; None if there is no file."""
  try:
    if bucket.is_bucket(folder):
      return bucket_lock.owner(f'{os.fspath(folder).rstrip("/")}/{FILE}')
    return (pathlib.Path(folder) / FILE).read_text(encoding='utf-8')
  except OSError:
    return None


def _acquire(path: pathlib.Path, wait: bool, key: str | None) -> int:
  """The descriptor of the lock's file, which names its process."""
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
      holder = os.read(file, 200).decode('utf-8', 'replace') or 'another'
      os.close(file)
      raise UsageError(
        f'{path.parent} is in use by {holder}; wait until it ends, or choose '
        'another folder.',
        key=key,
      ) from error
    except OSError as error:
      if error.errno not in _WITHOUT:
        raise
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file), path.stat()):
        holder = f'process {os.getpid()} on {socket.gethostname()}'
        os.truncate(file, 0)
        os.write(file, holder.encode())
        return file
    os.close(file)  # the last owner removed it between the two calls
