"""Bytes of files that are read in parts, on a disk or in a bucket."""

import fnmatch
import glob
import os
import re
from collections.abc import Container
from typing import Any, TypeAlias

from imagen_jax.errors import DataError
from imagen_jax.io import bucket

State: TypeAlias = tuple[int, int]  # (bytes, time in ns or generation)


def read(path: str, start: int, size: int) -> bytes:
  """Bytes of a file; of an object, by one request for that range.

  Returns:
    `size` bytes, or fewer at the end of the file.

  Raises:
    OSError: they cannot be read.
  """
  if not bucket.is_bucket(path):
    with open(path, 'rb', buffering=0) as file:
      return os.pread(file.fileno(), size, start)
  try:
    return bucket.filesystem(path).cat_file(path, start, start + size)
  except OSError:
    raise
  except Exception as error:  # of the bucket's library
    reason = bucket.reason(error) or str(error)
    raise OSError(f'{path} cannot be read ({reason})') from error


def state(path: str) -> State:
  """The size of a file, and what changes whenever it is written."""
  if bucket.is_bucket(path):
    return _state(bucket.filesystem(path).info(path))
  found = os.stat(path)
  return found.st_size, found.st_mtime_ns


def _state(info: dict[str, Any]) -> State:
  # Only Google's objects have a generation.
  return int(info['size']), int(info.get('generation') or 0)


def expand(pattern: str) -> list[str]:
  """'a{00..02}' -> a00, a01, a02, as a shell would."""
  match = re.search(r'\{(\d+)\.\.(\d+)\}', pattern)
  if not match:
    return [pattern]
  first, last = match.groups()
  numbers = range(int(first), int(last) + 1)
  head, tail = pattern[: match.start()], pattern[match.end() :]
  return [
    name
    for number in numbers
    for name in expand(f'{head}{number:0{len(first)}d}{tail}')
  ]


def top(path: str, found: Container[str]) -> str:
  """The folder below which all lies that a path or pattern can ever match.

  Args:
    path: see `find`.
    found: what it matches now.
  """
  magic = re.search(r'[*?[{]', path)
  if path in found or (magic and not os.path.isdir(path)):
    return os.path.dirname(path[: magic.start() if magic else None]) or '.'
  return path.rstrip('/') or '/'


def find(path: str, suffixes: tuple[str, ...]) -> dict[str, State | None]:
  """{file: its state} of what a path or a pattern matches, sorted by name.

  Args:
    path: of a file, of a folder, or a pattern such as 'a/{000..099}/*.tar'.
    suffixes: of the files of a folder, in folders of it too.

  Returns:
    states are None on a disk, where each would be a call to the file system;
    in a bucket a listing has them. `state` gives one.
  """
  if bucket.is_bucket(path):
    return _find_objects(path, suffixes)
  if os.path.isdir(path):
    pattern = os.path.join(glob.escape(path), '**', '*')
    found = glob.glob(pattern, recursive=True)
    found = [name for name in found if name.endswith(suffixes)]
  else:
    found = [
      name
      for pattern in expand(path)
      for name in ([pattern] if os.path.exists(pattern) else glob.glob(pattern))
    ]
  return dict.fromkeys(sorted(set(found)))


def _find_objects(
  path: str, suffixes: tuple[str, ...]
) -> dict[str, State | None]:
  """`find` in a bucket, by listing what begins as the pattern does."""
  scheme, _, rest = path.partition('://')
  magic = re.search(r'[*?[{]', rest)
  top = rest[: magic.start()].rpartition('/')[0] if magic else rest
  patterns = expand(rest)
  exact = {*patterns}
  globs = [p for p in patterns if glob.has_magic(p)]
  folder = rest.rstrip('/') + '/'
  system = bucket.filesystem(path)
  try:
    listed = system.find(top, detail=True)
  except Exception as error:
    raise bucket.kind_of(error, DataError)(
      f'{path} cannot be listed ({bucket.reason(error) or error}); check the '
      'name of the bucket, and that this machine may read it.'
    ) from error
  return {
    f'{scheme}://{name}': _state(listed[name])
    for name in sorted(listed)
    if name in exact
    or (name.startswith(folder) and name.endswith(suffixes))
    or any(
      fnmatch.fnmatchcase(name, p) and name.count('/') == p.count('/')
      for p in globs
    )
  }
