"""The results of checking a data set, in the user's cache directory.

They are not kept beside the data, which may be read-only or shared. A cache
that cannot be read or written is not an error: the check is run again.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.data.checked import UNREADABLE
from imagen_jax.io import files, paths

VERSION = 4


def cached(
  kind: str,
  location: object,
  state: Any,
  columns: int,
  make: Callable[[], tuple[Sequence[Sequence[int]], Mapping[str, str]]],
) -> tuple[np.ndarray, dict[str, str]]:
  """(int64 rows [n, columns], {name: what is wrong}) that `make` returns.

  They are taken from the cache if they were made with an equal `state`, a JSON
  value such as the size and modification time of the files. What a disk that
  failed left unread is not kept: it may be good.
  """
  found = load(kind, location)
  if found is None or found[0]['state'] != state:
    rows, bad = make()
    found = {'state': state, 'bad': bad}, np.array(rows, np.int64)
    if not any(reason.startswith(UNREADABLE) for reason in bad.values()):
      save(kind, location, *found)
  header, table = found
  return table.reshape(-1, columns), header['bad']


def path_for(kind: str, location: object) -> pathlib.Path:
  """The cache file of a folder, tar or TFDS build."""
  base = paths.cache_folder()
  if base is None:
    raise FileNotFoundError('there is no cache directory')
  name = hashlib.sha256(f'{kind} {location}'.encode()).hexdigest()[:24]
  return base / 'index' / f'{name}.npz'


def load(
  kind: str, location: object
) -> tuple[dict[str, Any], np.ndarray] | None:
  """(header dict, int64 rows) that `save` wrote, or None."""
  try:
    with np.load(path_for(kind, location), allow_pickle=False) as file:
      header = json.loads(str(file['header']))
      rows = file['rows']
    if header.pop('version') == VERSION and header.pop('of') == str(location):
      return header, rows
  except Exception:  # whatever is wrong, the check can be run again
    pass
  return None


def save(
  kind: str, location: object, header: Mapping[str, Any], rows: Any
) -> None:
  """Writes a cache file atomically."""
  text = json.dumps({**header, 'version': VERSION, 'of': str(location)})
  try:
    with files.replacing(path_for(kind, location)) as temporary:
      with temporary.open('wb') as file:
        np.savez(file, header=text, rows=np.asarray(rows, np.int64))
  except OSError:
    pass
