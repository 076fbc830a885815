"""The manifest of a directory, the one object that makes it whole.

Orbax writes checkpoints atomically but does not detect bit rot. So a manifest
is written beside the files once all of them are there: the size and sha256 of
each, and a digest of the manifest itself. A directory without it is incomplete.
"""

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from imagen_jax.errors import ModelError
from imagen_jax.io import files

FORMAT_VERSION = 1
NAME = 'manifest.json'


class Damaged(ModelError):
  """Files are missing, or differ from those that were written."""


def digests(
  directory: epath.Path, names: Iterable[str]
) -> dict[str, files.Digest]:
  """The digests of files, by their names in a directory."""
  names = list(names)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = pool.map(lambda name: files.digest(directory / name), names)
    return dict(zip(names, found))


def write(
  directory: epath.Path,
  fields: Mapping[str, Any],
  digests: Mapping[str, files.Digest],
) -> None:
  """Writes the manifest, which makes the directory whole.

  Args:
    directory: a complete directory; nothing else is written to it any more.
    fields: JSON-ready dict stored with the digests.
    digests: of all its files.
  """
  body = {**fields, 'format_version': FORMAT_VERSION, 'files': dict(digests)}
  text = _text({**body, 'digest': _self_digest(body)})
  files.write_text(directory / NAME, text)


def is_whole(directory: epath.Path | pathlib.Path) -> bool:
  """Whether the manifest exists; it is not read.

  Raises:
    OSError: the file system does not answer.
  """
  try:
    (directory / NAME).stat()  # `exists` is False after any error of a bucket
    return True
  except (FileNotFoundError, NotADirectoryError):
    return False


def steps(directory: epath.Path | pathlib.Path) -> list[int]:
  """The numbers of a directory's folders, in order, whole or not."""
  try:
    names = [path.name for path in directory.iterdir()]
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(int(name) for name in names if name.isdecimal())


def whole_steps(directory: epath.Path | pathlib.Path) -> Iterator[int]:
  """Those that are whole, the newest first; digests are not checked."""
  numbers = reversed(steps(directory))
  return (n for n in numbers if is_whole(directory / str(n)))


def verify(directory: epath.Path, names: Iterable[str] | None = None) -> None:
  """Checks files against their digests in the manifest.

  Args:
    directory: a whole directory.
    names: of the files; all of them by default.

  Raises:
    Damaged: naming the first file that is missing or differs.
    ModelError: as `read`.
  """
  described = read(directory)['files']

  def check(file: str) -> str | None:
    written = described[file]
    try:
      found = files.digest(directory / file)
    except OSError as error:
      reason = error.strerror or 'it is missing'
      return f'{directory / file} cannot be read ({reason}).'
    if found['bytes'] != written['bytes']:
      return (
        f'{directory / file} has {found["bytes"]} bytes instead of '
        f'{written["bytes"]}.'
      )
    if found != written:
      return f'{directory / file} has changed since it was written.'
    return None

  with concurrent.futures.ThreadPoolExecutor() as pool:
    for problem in pool.map(check, described if names is None else names):
      if problem:
        raise Damaged(problem)


def read(directory: epath.Path) -> dict[str, Any]:
  """Reads and checks a directory's manifest.

  Raises:
    Damaged: it is missing or has changed since it was written.
    ModelError: it has another format version.
  """
  path = directory / NAME
  try:
    raw = path.read_bytes()
  except FileNotFoundError as error:
    raise Damaged(f'{directory} is incomplete: it lacks its {NAME}.') from error
  except OSError as error:
    raise Damaged(f'{path} cannot be read ({error.strerror}).') from error
  try:
    body = json.loads(raw)
    digest = body.pop('digest')
    # The digest is of the parsed content. The bytes must be its canonical
    # form too, to detect changes that parsing ignores, such as a blank.
    whole = digest == _self_digest(body) and raw == _text(
      {**body, 'digest': digest}
    ).encode('ascii')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    whole = False
  if not whole:
    raise Damaged(f'{path} has changed since it was written.')
  if body['format_version'] != FORMAT_VERSION:
    raise ModelError(
      f'{path} has format {body["format_version"]} and this version reads '
      f'{FORMAT_VERSION}: upgrade imagen_jax.'
    )
  return {**body, 'digest': digest}


def _text(body: Mapping[str, Any]) -> str:
  return json.dumps(body, indent=1, sort_keys=True) + '\n'


def _self_digest(body: Mapping[str, Any]) -> str:
  return hashlib.sha256(_text(body).encode('ascii')).hexdigest()
