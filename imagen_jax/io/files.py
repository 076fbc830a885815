"""Atomic writes, and reads whose errors are one sentence.

A reader sees the old file or the new one, never a partial one: data are
written to a temporary file in the same directory, synced, and renamed.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, TypedDict

from imagen_jax.errors import DataError, ImagenError, ModelError
from imagen_jax.io import bucket

AnyPath: TypeAlias = str | os.PathLike[str]

COPY_AGAIN = 'copy it again from where it came'
# Errors of the file system; {} is the file.
STORAGE = {
  errno.ENOSPC: 'the disk is full at {}; free space, or write elsewhere.',
  errno.EDQUOT: 'the disk quota is used up at {}; free space there.',
  errno.EROFS: '{} is on a read-only file system; write elsewhere.',
  errno.EACCES: 'permission is denied at {}; check who owns it.',
  errno.EPERM: 'permission is denied at {}; check who owns it.',
}


class Path(Protocol):
  """The methods used here of `pathlib.Path` or, in a bucket, `epath.Path`."""

  def open(self, mode: Any, /) -> Any: ...

  def mkdir(self, *, parents: bool, exist_ok: bool) -> Any: ...


class Digest(TypedDict):
  """Size and content of a file."""

  bytes: int
  sha256: str


@contextlib.contextmanager
def replacing(
  path: AnyPath, *, error: type[ImagenError] | None = None
) -> Iterator[pathlib.Path]:
  """Yields a temporary path beside `path`, renamed to it on success.

  The block writes a file there, or makes a directory; a directory cannot
  replace one that is not empty. If the block raises, what it wrote is removed.
  In a bucket `path` is a file, which is written in a local folder and uploaded.

  Args:
    path: the final path; its directory is created if missing.
    error: raised instead of an `OSError`; None raises that itself.
  """
  if bucket.is_bucket(path):
    with tempfile.TemporaryDirectory() as folder:
      local = pathlib.Path(folder, os.path.basename(os.fspath(path)))
      yield local
      bucket.filesystem(path).put_file(str(local), os.fspath(path))
    return
  path = pathlib.Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _renamed(path) as temporary:
      yield temporary
  except OSError as problem:
    if error is None:
      raise
    reason = problem.strerror or storage_reason(problem) or problem
    raise error(
      f'{path} could not be written ({reason}); check space and permissions.'
    ) from problem


@contextlib.contextmanager
def _renamed(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """`replacing` on a file system, in a directory that exists."""
  # Hidden, of a name that no other writer of `path` uses.
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
  try:
    yield temporary
    if not temporary.is_dir():
      with temporary.open('rb+') as file:
        os.fsync(file.fileno())
    temporary.replace(path)
  except OSError as problem:
    problem.filename = problem.filename or str(path)
    raise
  finally:
    if temporary.is_dir():
      shutil.rmtree(temporary)
    with contextlib.suppress(OSError):  # renamed, or never made
      temporary.unlink()


def write_bytes(path: Path, data: bytes) -> None:
  """Writes a file atomically, on a file system or in a bucket."""
  if bucket.is_bucket(str(path)):
    with path.open('wb') as file:
      file.write(data)
    return
  with _renamed(pathlib.Path(str(path))) as temporary:
    temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
  """Writes a text file in UTF-8."""
  write_bytes(path, text.encode('utf-8'))


def append_line(path: Path, value: Any) -> None:
  """Adds a JSON value to JSON Lines; a bucket's file is written again."""
  line = f'{json.dumps(value)}\n'.encode()
  if not bucket.is_bucket(str(path)):
    with path.open('ab') as file:
      file.write(line)
    return
  try:
    with path.open('rb') as file:
      old = file.read()
  except FileNotFoundError:
    old = b''
  write_bytes(path, old + line)


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON value, indented."""
  write_text(path, json.dumps(value, indent=2) + '\n')


def parse_json(text: str | bytes) -> Any:
  """`json.loads` for text of any origin, such as endless brackets.

  Raises:
    ValueError: it is not JSON.
  """
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error


def inside(folder: AnyPath, name: Any) -> pathlib.Path | None:
  """The file of a folder that untrusted text names; None if it leaves it."""
  parts = name.split('/') if isinstance(name, str) else ['..']
  if '..' in parts or not parts[0] or '\\' in name or '\0' in name:
    return None
  return pathlib.Path(folder, name)


def is_hidden(name: AnyPath) -> bool:
  """Whether a relative name, or a folder in it, belongs to other programs.

  Examples are ._one.jpg, .ipynb_checkpoints/one.jpg and .Trash-0/one.jpg.
  """
  return any(p.startswith('.') for p in pathlib.PurePath(name).parts)


def read_json(
  path: AnyPath,
  *,
  error: type[ImagenError] = ModelError,
  advice: str = COPY_AGAIN,
  missing: str | None = None,
  version: int | None = None,
) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    path: the file.
    error: type of the exceptions.
    advice: what to do about a file that cannot be read, for the message.
    missing: what to do about a missing file; None is `advice`.
    version: the `format_version` that the object must have; None: any.

  Raises:
    error: the file is missing, not a JSON object, or of another version.
  """
  path = bucket.at(path)
  try:
    value = parse_json(path.read_bytes().decode('utf-8-sig'))
  except FileNotFoundError as problem:
    raise error(f'{path} does not exist; {missing or advice}.') from problem
  except (OSError, ValueError) as problem:
    raise error(
      f'{path} cannot be read as JSON ({problem}); {advice}.'
    ) from problem
  if not isinstance(value, dict):
    raise error(f'{path} does not hold a JSON object; {advice}.')
  found = value.get('format_version')
  if version is not None and found != version:
    raise error(
      f'{path} has format {found} and this version of imagen_jax reads '
      f'{version}: upgrade, or check that the file is the right one.'
    )
  return value


def check_keys(path: AnyPath, found: Any, **types: type) -> None:
  """Raises `DataError` if an object of a file lacks a key, or its type."""
  for key, kind in types.items():
    if not isinstance(found, dict) or type(found.get(key)) is not kind:
      raise DataError(
        f'{path} lacks {key!r}, or has another type of value there; '
        f'{COPY_AGAIN}.'
      )


def read_text(path: AnyPath, *, advice: str) -> str:
  """The text of a file in UTF-8, without a byte-order mark.

  Lines end with a newline character, as on every system. Split them there: to
  `str.splitlines`, U+2028 and U+0085 within a line are line ends too.

  Args:
    path: the file.
    advice: what to give instead, for the message.

  Raises:
    DataError: the file cannot be read, or is not UTF-8 text.
  """
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8-sig')
    if '\0' in text:
      raise ValueError('it has null bytes, as UTF-16 and binary files do')
    return text
  except (OSError, ValueError) as problem:
    raise DataError(
      f'{path} cannot be read ({problem}); {advice}.'
    ) from problem


def write_lines(path: Path, values: Iterable[Any]) -> None:
  """Writes JSON values as JSON Lines."""
  write_text(path, ''.join(json.dumps(value) + '\n' for value in values))


def read_lines(
  path: AnyPath,
  *,
  fields: Mapping[str, type | types.UnionType] | None = None,
  error: type[ImagenError] = ModelError,
) -> Iterator[dict[str, Any]]:
  """The objects of a JSON Lines file, without lines that a kill cut short.

  Args:
    path: the file.
    fields: {key: type} of what is read; a line without them does not count.
    error: type of the exceptions.

  Raises:
    error: the file is missing or cannot be read.
  """
  try:
    text = bucket.at(path).read_bytes().decode('utf-8-sig', 'replace')
  except OSError as problem:
    raise error(
      f'{path} cannot be read ({problem}); {COPY_AGAIN}.'
    ) from problem
  for line in text.split('\n'):
    with contextlib.suppress(ValueError, TypeError):
      row = dict(parse_json(line))
      if all(isinstance(row.get(k), t) for k, t in (fields or {}).items()):
        yield row


def make_folder(path: Path) -> None:
  """Makes a folder and its parents; a bucket has none."""
  if not bucket.is_bucket(str(path)):
    path.mkdir(parents=True, exist_ok=True)


def tree(folder: AnyPath) -> dict[str, int]:
  """{relative path: bytes} of all files below; of a bucket in one listing."""
  if bucket.is_bucket(folder):
    start = os.fspath(folder).partition('://')[2].rstrip('/') + '/'
    found = bucket.filesystem(folder).find(os.fspath(folder), detail=True)
    return {n.removeprefix(start): found[n]['size'] for n in sorted(found)}
  top = pathlib.Path(folder)
  below = (path for path in sorted(top.rglob('*')) if path.is_file())
  return {p.relative_to(top).as_posix(): p.stat().st_size for p in below}


def digest(path: Path) -> Digest:
  """The size and sha256 of a file, read in chunks."""
  with path.open('rb') as file:
    sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'bytes': file.tell(), 'sha256': sha256}


def storage_reason(error: BaseException | None) -> str | None:
  """The file system's error within a library's message, or None."""
  text = str(error)
  found = next((w for w in map(os.strerror, STORAGE) if w in text), None)
  return found or (None if error is None else bucket.reason(error))


def git_commit() -> str | None:
  """The commit of this checkout; None where the package is installed."""
  try:
    return subprocess.run(
      ['git', 'rev-parse', 'HEAD'],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None
