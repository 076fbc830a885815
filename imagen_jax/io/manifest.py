"""Manifests: digests of a directory's files, which detect damage.

Orbax writes checkpoints atomically but does not detect bit rot. So a manifest
is written beside the files once they are complete: the size and sha256 of each,
and a digest of the manifest itself. Every process of a job lists the files it
wrote, in `manifest-00000-of-00001.json` and so on; a directory that lacks one
of them is incomplete.
"""

import concurrent.futures
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from imagen_jax.errors import ModelError
from imagen_jax.io import files

FORMAT_VERSION = 1
_NAME = re.compile(r'manifest-(\d{5})-of-(\d{5})\.json')
_OWNER = re.compile(r'(?:^|[._])process_(\d+)$')


class Damaged(ModelError):
  """Files are missing, or differ from those that were written."""


def name(process: int, processes: int) -> str:
  """File name of one process's manifest."""
  return f'manifest-{process:05d}-of-{processes:05d}.json'


def write(
  directory: epath.Path,
  fields: Mapping[str, Any],
  *,
  process: int = 0,
  processes: int = 1,
) -> None:
  """Writes the manifest of the files that `process` wrote.

  Args:
    directory: a complete directory; nothing else is written to it any more.
    fields: JSON-ready dict stored with the digests.
    process: index of this process.
    processes: number of processes that write manifests here.
  """
  own = [f for f in _files(directory) if _owner(f, processes) == process]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    digests = list(pool.map(lambda f: files.digest(directory / f), own))
  body = {
    **fields,
    'format_version': FORMAT_VERSION,
    'process': process,
    'processes': processes,
    'files': dict(zip(own, digests)),
  }
  text = _text({**body, 'digest': _self_digest(body)})
  files.write_text(directory / name(process, processes), text)


def is_whole(directory: epath.Path) -> bool:
  """Whether every process's manifest exists; none is read."""
  found = [m for m in map(_NAME.fullmatch, _names(directory)) if m]
  return any(
    sum(m[2] == count for m in found) == int(count)
    for count in {m[2] for m in found}
  )


def read(directory: epath.Path) -> list[dict[str, Any]]:
  """Reads and checks a directory's manifests, in the order of the processes.

  Raises:
    Damaged: a manifest is missing or has changed since it was written.
    ModelError: it has another format version.
  """
  if not is_whole(directory):
    raise Damaged(f'{directory} is incomplete: it lacks its manifest.')
  found = sorted(n for n in _names(directory) if _NAME.fullmatch(n))
  return [_read(directory / n) for n in found]


def verify(directory: epath.Path) -> list[dict[str, Any]]:
  """Checks every file against its digest; returns `read(directory)`.

  Raises:
    Damaged: naming the first file that is missing or differs.
    ModelError: as `read`.
  """
  manifests = read(directory)
  described = {f: d for m in manifests for f, d in m['files'].items()}

  def check(item: tuple[str, files.Digest]) -> str | None:
    file, written = item
    try:
      found = files.digest(directory / file)
    except OSError as error:
      return f'{directory / file} cannot be read ({error.strerror}).'
    if found['bytes'] != written['bytes']:
      return (
        f'{directory / file} has {found["bytes"]} bytes instead of '
        f'{written["bytes"]}.'
      )
    if found != written:
      return f'{directory / file} has changed since it was written.'
    return None

  with concurrent.futures.ThreadPoolExecutor() as pool:
    for problem in pool.map(check, described.items()):
      if problem:
        raise Damaged(problem)
  return manifests


def _read(path: epath.Path) -> dict[str, Any]:
  try:
    raw = path.read_bytes()
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


def _names(directory: epath.Path) -> list[str]:
  return [p.name for p in directory.iterdir()] if directory.exists() else []


def _files(directory: epath.Path, prefix: str = '') -> Iterator[str]:
  """The relative paths of all files below, except the manifests.

  A manifest that another process is writing begins with a dot.
  """
  for path in sorted(directory.iterdir()):
    if path.is_dir():
      yield from _files(path, f'{prefix}{path.name}/')
    elif prefix or not path.name.lstrip('.').startswith('manifest-'):
      yield prefix + path.name


def _owner(file: str, processes: int) -> int:
  """The process that wrote a file, from Orbax's name; 0 if shared."""
  owners = [m for m in map(_OWNER.search, file.split('/')) if m]
  owner = int(owners[0][1]) if owners else 0
  return owner if owner < processes else 0
