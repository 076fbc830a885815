"""A folder of images with captions, the most common layout.

Either every image has a text file of the same name beside it,

  cats/one.jpg   cats/one.txt   cats/one.caption

of which each is a caption, or the folder holds a table with a row per image,
`metadata.jsonl`, `metadata.csv` or `metadata.parquet`:

  {"file_name": "cats/one.jpg", "text": "a cat asleep on a laptop"}
"""

import hashlib
import json
import mimetypes
import pathlib
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from imagen_jax.data import index_cache, metadata
from imagen_jax.data import where as conditions
from imagen_jax.data.checked import Checked, clean_captions, survey
from imagen_jax.errors import DataError
from imagen_jax.io import files
from imagen_jax.io.decode import SUFFIXES, BadSample, inspect
from imagen_jax.io.files import AnyPath

OTHERS = ('.heic', '.avif', '.jxl', '.jp2')  # which mimetypes may not know
TEXTS = ('.txt', '.caption')  # files with a caption


class FolderSource(Checked):
  """Random access to a folder's images, {'image', 'caption'} each.

  Images are decoded by `decode`. Those that are too small are skipped, since
  upsampling them would teach the model blur. Bad samples are skipped too:
  images that do not decode, captions that are missing or not text.

  Args:
    path: the folder, searched recursively; the others are `Checked`'s.

  Attributes:
    names: of the images, relative to the folder, sorted (with buckets, shape
      by shape).

  Raises:
    DataError: there is no folder or no usable image, too many are bad, or
      the metadata are broken.
    UsageError: the metadata have no column that is asked for.
  """

  path_is = 'a folder of images with .txt captions beside them'
  needs = (
    f'It needs images ({" ".join(SUFFIXES)}) with a .txt or .caption beside '
    'each, or metadata.jsonl, .csv or .parquet.'
  )

  def scan(self, path: AnyPath) -> tuple[dict[str, str], dict[str, str]]:
    self.path = pathlib.Path(path)
    table_file = _table_of(self.path)
    found, rows, bad = self._find(table_file)
    known = found.keys() | bad.keys()
    self.unused = dict(_unused(self.path, known, table_file))
    states, unreadable = _check(self.path, list(found))
    names = [*states]
    columns: dict[str, Any] = {}
    if self.conditions:
      columns = {
        one.column: [rows[name].get(one.column) for name in names]
        for one in self.conditions
      } | conditions.caption_columns([found[name] for name in names])
    table = np.array([*states.values()], np.int64).reshape(-1, 3)
    order, left = self.select(names, table[:, :2], columns)
    self.names = tuple(names[i] for i in order)
    self._crcs = table[order, 2].tolist()
    self._captions = tuple(found[name] for name in self.names)
    return bad | unreadable, left

  def __len__(self) -> int:
    return len(self.names)

  @property
  def fingerprint(self) -> str:
    """sha256 of the names, the captions, and the images' checksums."""
    whole = json.dumps([self.names, self._captions, self._crcs])
    return hashlib.sha256(whole.encode()).hexdigest()

  def name(self, i: int) -> str:
    return self.names[i]

  def caption(self, i: int) -> str:
    return self._captions[i][0]

  def skipped_image(self, name: str) -> bytes | None:
    try:
      return (self.path / name).read_bytes()
    except OSError:
      return None

  def read(self, i: int) -> tuple[bytes, Sequence[str]]:
    file = self.path / self.names[i]
    try:
      return file.read_bytes(), self._captions[i]
    except FileNotFoundError:
      raise BadSample('it does not exist') from None

  def _find(
    self, table_file: pathlib.Path | None
  ) -> tuple[dict[str, tuple[str, ...]], dict[str, dict], dict[str, str]]:
    """({name: captions}, {name: row of the metadata}, {name: problem}).

    Sorted by name.
    """
    path = self.path
    raw: dict[str, Any]
    if table_file:
      raw, rows, bad = _read_metadata(table_file, self.columns)
      known = {name for row in rows.values() for name in row}
    else:
      metadata.check_columns(self.columns or (), (), path)
      raw, bad, known = {name: None for name in _images(path)}, {}, set()
      rows = {name: {} for name in raw}
    conditions.check_columns(self.conditions, sorted(known), path)
    found = {}
    for name in sorted(raw):
      try:
        texts = raw[name] if table_file else _read_captions(path / name)
        found[name] = clean_captions(texts)
      except BadSample as error:
        bad[name] = str(error)
    return found, rows, bad


def _table_of(path: pathlib.Path) -> pathlib.Path | None:
  """The metadata of a folder, which list its images; None: there are none."""
  if not path.is_dir():
    raise DataError(
      f'{path} is not a folder: set data.path to one that holds images.'
    )
  tables = [path / f'metadata{suffix}' for suffix in metadata.SUFFIXES]
  tables = [file for file in tables if file.is_file()]
  if len(tables) > 1:
    names = ' and '.join(file.name for file in tables)
    raise DataError(f'{path} has {names}; keep one of them.')
  return tables[0] if tables else None


def _images(path: pathlib.Path) -> Iterator[str]:
  """Names, relative to `path`, of the files that look like images."""
  for file in path.rglob('*'):
    name = file.relative_to(path)
    if file.suffix.lower() in SUFFIXES and not files.is_hidden(name):
      yield name.as_posix()


def _unused(
  path: pathlib.Path, known: Collection[str], table_file: pathlib.Path | None
) -> Iterator[tuple]:
  """(name, reason) of the images that are no samples, sorted by name."""
  for file in sorted(path.rglob('*')):
    name = file.relative_to(path)
    kind, _ = mimetypes.guess_type(name)
    suffix = file.suffix.lower()
    image = suffix in (*SUFFIXES, *OTHERS) or (kind or '').startswith('image/')
    if image and not files.is_hidden(name) and name.as_posix() not in known:
      yield (
        name.as_posix(),
        f'{table_file.name} does not list it'
        if table_file and suffix in SUFFIXES
        else f'only {", ".join(SUFFIXES)} are read',
      )


def _read_metadata(
  file: pathlib.Path, columns: Collection[str] | None
) -> tuple[dict[str, list[Any]], dict[str, dict[str, Any]], dict[str, str]]:
  """({name: captions}, {name: row}, {name: what is wrong}) of metadata."""
  table = metadata.read(file)
  metadata.check_columns(columns or (), table.columns, file)
  found, rows, bad = {}, {}, {}
  for where, row in table.rows:
    name, captions = row.get('file_name'), metadata.captions(row, columns)
    if not isinstance(name, str) or captions is None:
      raise DataError(
        f'{file}, {where}, has no file_name and text; its columns are '
        f'{", ".join(map(str, row)) or "none"}. Correct it, or name the column '
        'with the captions in data.captions.'
      )
    place = files.inside('', name)
    if name in bad or (place and place.as_posix() in found):
      bad[where] = 'it lists an image a second time'
    elif place is None:
      bad[name] = 'its name points outside the folder'
    else:
      found[place.as_posix()] = captions
      rows[place.as_posix()] = row
  return found, rows, bad


def _read_captions(image: pathlib.Path) -> list[bytes]:
  """What is in the files with the captions of an image."""
  found = []
  for suffix in TEXTS:
    try:
      found.append(image.with_suffix(suffix).read_bytes())
    except FileNotFoundError:
      pass
    except OSError as error:
      raise BadSample('its caption cannot be read') from error
  return found


def _check(
  path: pathlib.Path, names: Sequence[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
  """({name: (width, height, CRC-32)}, {name: what is wrong}), both sorted.

  Cached; an image is read again if its `_state` has changed.
  """
  location = path.resolve()
  header, rows = index_cache.load('folder', location) or ({'names': []}, [])
  known = {name: (*map(int, row),) for name, row in zip(header['names'], rows)}
  states = {name: _state(path / name) for name in names}
  new = [n for n in names if known.get(n, ())[:2] != states[n]]
  found, bad = survey(
    new,
    lambda name: (*inspect(path / name), _crc(path / name)),
    f'checking {path}',
  )
  good: dict[str, tuple[int, ...]] = {
    name: found.get(name) or known[name][2:]
    for name in names
    if name not in bad
  }
  if new:
    table = [[*states[name], *row] for name, row in good.items()]
    index_cache.save('folder', location, {'names': list(good)}, table)
  return good, bad


def _crc(file: pathlib.Path) -> int:
  crc = 0
  with file.open('rb') as data:
    while some := data.read(2**20):
      crc = zlib.crc32(some, crc)
  return crc


def _state(file: pathlib.Path) -> tuple[int, int]:
  """(size, modification time) of a file; (−1, −1) if it cannot be read."""
  try:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
  except OSError:
    return -1, -1
