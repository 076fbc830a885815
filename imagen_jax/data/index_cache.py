"""The results of checking a data set, in the user's cache directory.

They are not kept beside the data, which may be read-only or shared. A cache
that cannot be read or written is not an error: the check is run again.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from imagen_jax.io import files, paths

VERSION = 4


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
