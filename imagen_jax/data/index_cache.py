"""What checking a data set has found, kept in the user's cache directory.

Never beside the data, which may be read-only or shared. A cache that cannot
be read or written is no error: the check is made again.
"""

import hashlib
import json
import os
import pathlib
import tempfile

import numpy as np

VERSION = 1


def path_for(kind, location):
  """The cache file of one folder, tar or build."""
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  name = hashlib.sha256(f'{kind} {location}'.encode()).hexdigest()[:24]
  return pathlib.Path(base) / 'imagen_jax' / 'index' / f'{name}.npz'


def load(kind, location):
  """(header dict, int64 rows) that `save` wrote, or None."""
  try:
    with np.load(path_for(kind, location), allow_pickle=False) as file:
      header = json.loads(str(file['header']))
      rows = file['rows']
    if header.pop('version') == VERSION and header.pop('of') == str(location):
      return header, rows
  except Exception:  # whatever is wrong with it, the data are still there
    pass
  return None


def save(kind, location, header, rows):
  """Writes a cache file, whole or not at all."""
  path, temporary = path_for(kind, location), None
  header = {**header, 'version': VERSION, 'of': str(location)}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix='.tmp')
    with os.fdopen(handle, 'wb') as file:
      np.savez(file, header=json.dumps(header), rows=np.asarray(rows, np.int64))
    os.replace(temporary, path)
  except (OSError, RuntimeError):  # RuntimeError: there is no home directory
    if temporary is not None and os.path.exists(temporary):
      os.unlink(temporary)
