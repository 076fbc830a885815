"""The index of a set of tars: where each image and caption lies.

It is one file, written once and mapped into the memory of every process, which
so share it: 33 bytes a sample. Its parts are the rows, the widths and heights
of the images, JSON Lines of what is wrong, and a footer with the tars.
"""

import bisect
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import bucket, files, paths
from imagen_jax.io.files import AnyPath

NAME = 'tars.index'  # beside the tars
MAGIC = b'imagen-tars-2\n\n\n'  # 16 bytes, at both ends
ROW = np.dtype(
  [
    ('image', '<u8'),  # offset in its tar
    ('text', '<u8'),
    ('image_size', '<u4'),
    ('text_size', '<u4'),
    ('crc', '<u4'),  # of the image
    ('is_json', 'u1'),  # whether the text is the sample's .json
  ]
)
SIZE = np.dtype(('<u2', 2))  # width and height of the upright image
AGAIN = 'give the file of an index, or make it again with imagen-index'


@dataclasses.dataclass(frozen=True)
class Tar:
  """A tar of an index.

  Attributes:
    name: its path below the folder of the set.
    bytes: its size.
    time: of its last change in ns, or its generation in a bucket; None: a tar
      of the same size counts as the same, such as a copy.
    start: number of its first row.
    count: number of its rows.
    bad: number of its samples that are left out.
    digest: of its rows.
  """

  name: str
  bytes: int
  time: int | None
  start: int = 0
  count: int = 0
  bad: int = 0
  digest: str = ''


@dataclasses.dataclass(frozen=True)
class Found:
  """What is in a tar.

  Attributes:
    tar: which.
    rows: [n] of type `ROW`.
    sizes: [n, 2], widths and heights of the upright images in pixels.
    bad: {key: what is wrong} of the samples that are left out.
  """

  tar: Tar
  rows: np.ndarray
  sizes: np.ndarray
  bad: Mapping[str, str]


class Index:
  """An index file, of which only what is used comes into memory.

  Args:
    path: of a local file.

  Attributes:
    tars: {name: `Tar`}, in order of names.
    rows: [n] of type `ROW`, mapped.

  Raises:
    DataError: it is missing, damaged, or no index.
  """

  def __init__(self, path: AnyPath) -> None:
    self.path = os.fspath(path)
    try:
      with open(self.path, 'rb') as file:
        footer = _read_footer(file)
      self.tars = {t['name']: Tar(**t) for t in footer['tars']}
      count = sum(tar.count for tar in self.tars.values())
      self._sizes = len(MAGIC) + count * ROW.itemsize
      self._bad = self._sizes + count * SIZE.itemsize, int(footer['bad'])
      self.rows = np.zeros(0, ROW)
      if count:
        rows = np.memmap(self.path, ROW, 'r', len(MAGIC), (count,))
        self.rows = rows.view(np.ndarray)  # whose items are read faster
    except FileNotFoundError as error:
      raise DataError(f'{path} does not exist; {AGAIN}.') from error
    except (ValueError, KeyError, TypeError, OSError) as error:
      raise DataError(
        f'{path} cannot be read as an index of tars ({error}); {AGAIN}.'
      ) from error

  def __reduce__(self) -> tuple:
    return Index, (self.path,)  # not the rows themselves

  def sizes(self, start: int, stop: int) -> np.ndarray:
    """[stop − start, 2] of the images of some rows, read and not mapped."""
    where = self._sizes + start * SIZE.itemsize
    return np.fromfile(self.path, SIZE, stop - start, offset=where)

  def bad(self) -> Iterator[tuple[str, str, str]]:
    """(tar, key, what is wrong) of the samples that are left out."""
    start, size = self._bad
    with open(self.path, 'rb') as file:
      file.seek(start)
      while size > 0 and (line := file.readline()):
        size -= len(line)
        yield tuple(json.loads(line))

  def found(self, name: str, bad: Mapping[str, str]) -> Found:
    """What is in a tar, of which `bad` is left out."""
    tar = self.tars[name]
    stop = tar.start + tar.count
    rows, sizes = self.rows[tar.start : stop], self.sizes(tar.start, stop)
    return Found(tar, rows, sizes, bad)


def _read_footer(file: IO[bytes]) -> dict[str, Any]:
  end = file.seek(-(len(MAGIC) + 8), os.SEEK_END)
  (size,) = struct.unpack('<Q', file.read(8))
  whole = file.read() == MAGIC and size < end
  file.seek(end - size if whole else 0)
  footer = files.parse_json(file.read(size)) if whole else None
  if not isinstance(footer, dict):
    raise ValueError('it is cut short, or something else')
  return footer


def check_place(path: AnyPath, *, key: str) -> None:
  """Checks that an index can be written, before hours of work.

  Args:
    path: of its file, on a disk or in a bucket.
    key: of the error, see `UsageError`.

  Raises:
    UsageError: there is something else, such as one of the tars, or files
      cannot be written there.
  """
  place = bucket.at(path, key=key)
  paths.check_folder(place.parent, key=key, in_bucket=True)
  if not place.exists():
    return
  head = b''
  if place.is_file():
    with place.open('rb') as file:
      head = file.read(len(MAGIC))
  if head != MAGIC:
    raise UsageError(
      f'{path} is there and no index of tars, so it is not written over; give '
      'another file, or remove it.',
      key=key,
    )


def write(path: AnyPath, found: Iterable[Found]) -> None:
  """Writes an index; a file appears when it is complete.

  Args:
    path: of the file, on a disk or in a bucket.
    found: in order of the tars' names.
  """
  tars: list[dict[str, Any]] = []
  sizes, bad, start = [], [], 0
  with files.replacing(path) as temporary, temporary.open('wb') as file:
    file.write(MAGIC)
    for one in found:
      data = np.ascontiguousarray(one.rows, ROW).tobytes()
      file.write(data)
      sizes.append(one.sizes.astype(SIZE.base))
      digest = hashlib.sha256(data + sizes[-1].tobytes()).hexdigest()
      count, name = len(one.rows), one.tar.name
      bad += [json.dumps([name, *entry]) + '\n' for entry in one.bad.items()]
      tar = dataclasses.replace(
        one.tar, start=start, count=count, bad=len(one.bad), digest=digest
      )
      tars.append(dataclasses.asdict(tar))
      start += count
    for some in sizes:
      file.write(some.tobytes())
    lines = ''.join(bad).encode()
    footer = json.dumps({'tars': tars, 'bad': len(lines)}).encode()
    file.write(lines + footer + struct.pack('<Q', len(footer)) + MAGIC)


def merge(
  indexes: Iterable[Index], fresh: Mapping[str, Found] | None = None
) -> Iterator[Found]:
  """The parts of several indexes, in order; of equal names, the last's.

  Args:
    indexes: the indexes.
    fresh: {name: what is in that tar}, which comes after them.
  """
  chosen: dict[str, Index | Found] = {}
  bad: dict[str, dict[str, str]] = {}
  for index in indexes:
    chosen |= dict.fromkeys(index.tars, index)
    bad |= {name: {} for name in index.tars}
    for name, key, reason in index.bad():
      bad[name][key] = reason
  chosen |= fresh or {}
  for name, one in sorted(chosen.items(), key=lambda item: item[0]):
    yield one if isinstance(one, Found) else one.found(name, bad[name])


class Selected:
  """The rows that are used, shape by shape, numbered from 0.

  A bit a row and shape and a count a block: 6 MB of 50 million, where a list
  of their numbers would be 400 MB in every process.

  Args:
    total: number of rows of the index.
    choose: (start, stop) -> int8 [stop − start], the number of each row's
      shape, or a negative number if it is not used.
    num_shapes: how many shapes there are.

  Attributes:
    counts: of the rows of each shape.
    left: {negative number: how many rows have it}.
    examples: {negative number: the first of these rows}.
  """

  BLOCK, CHUNK, EXAMPLES = 2**12, 2**20, 100

  def __init__(
    self,
    total: int,
    choose: Callable[[int, int], np.ndarray],
    num_shapes: int = 1,
  ) -> None:
    width = self.BLOCK // 8
    size = -(-total // self.BLOCK) * width
    self._bits = np.zeros((num_shapes, size), np.uint8)
    self.left = collections.Counter[int]()
    self.examples = collections.defaultdict[int, list[int]](list)
    for start in range(0, total, self.CHUNK):
      chosen = choose(start, min(start + self.CHUNK, total))
      for shape, bits in enumerate(self._bits):
        packed = np.packbits(chosen == shape)
        bits[start // 8 : start // 8 + len(packed)] = packed
      for code in np.unique(chosen[chosen < 0]).tolist():
        rows = np.flatnonzero(chosen == code)
        self.left[code] += len(rows)
        room = self.EXAMPLES - len(self.examples[code])
        self.examples[code] += [start + int(row) for row in rows[:room]]
    blocks = np.bitwise_count(self._bits).reshape(num_shapes, -1, width)
    per_block = blocks.sum(-1, dtype=np.int64)
    self.counts = per_block.sum(-1).tolist()
    self._length = sum(self.counts)
    self._ends = per_block.ravel().cumsum()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, i: int) -> int:
    """The row of number `i`."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    block = bisect.bisect_right(self._ends, i)
    before = int(self._ends[block - 1]) if block else 0
    width = self.BLOCK // 8
    bits = self._bits.ravel()[block * width : (block + 1) * width]
    chosen = np.unpackbits(bits).view(bool)  # `nonzero` is slow with numbers
    row = int(chosen.nonzero()[0][i - before])
    return block % (self._bits.shape[1] // width) * self.BLOCK + row


def spans(tars: Iterable[Tar]) -> Iterator[tuple[int, int]]:
  """(first row, end) of runs of tars that follow each other."""
  start = stop = 0
  for tar in tars:
    if tar.start != stop:
      yield start, stop
      start = tar.start
    stop = tar.start + tar.count
  yield start, stop


def local(path: AnyPath) -> str:
  """The path of an index on a disk: its own, or that of a copy of an object.

  An object cannot be mapped, so each host copies it, once, into the cache.
  """
  path = os.fspath(path)
  if not bucket.is_bucket(path):
    return path
  system = bucket.filesystem(path)
  info = system.info(path)
  state = [path, info['size'], info.get('generation'), info.get('etag')]
  copy = in_cache(json.dumps(state))
  if not copy.exists():
    with files.replacing(copy, error=DataError) as temporary:
      system.get_file(path, str(temporary))
  return str(copy)


def in_cache(what: str) -> pathlib.Path:
  """The file for an index in the user's cache directory.

  Raises:
    DataError: there is no such directory.
  """
  base = paths.cache_folder()
  if base is None:
    raise DataError(
      'there is no cache directory for an index of tars: set XDG_CACHE_HOME to '
      'one, or data.index to a file.'
    )
  name = hashlib.sha256(what.encode()).hexdigest()[:24]
  return base / 'index' / f'{name}.index'
