"""Records of any number of ArrayRecord files, of which few are open at once."""

import bisect
import collections
import dataclasses
import itertools
import os
import re
import resource
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from imagen_jax.errors import DataError
from imagen_jax.io import files
from imagen_jax.io.aspect import Shape
from imagen_jax.io.decode import BadSample

# For single records: no read-ahead, no threads, and a small buffer.
OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
BUFFER = 2**14
MAX_OPEN = 512  # 0.3 MB each, with 20,000 records
# How the library names a failed system call or request in its messages. All
# else that it says is about the contents.
_FAILED = re.compile(r'\(\) failed: |; reading \w+://')


@dataclasses.dataclass(frozen=True)
class Part:
  """A file of records.

  Attributes:
    path: of the file; gs:// is read by range requests.
    bytes: its size; another one is an error.
    count: number of records.
    removed: numbers of those that are left out, rising.
    shapes: (height, width, number of records) of each run of records of one
      shape of images; empty where that is of no interest.
  """

  path: str
  bytes: int
  count: int
  removed: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.uint32), compare=False
  )

  shapes: Sequence[Sequence[int]] = ()

  def __len__(self) -> int:
    return self.count - len(self.removed)

  def runs(self) -> Iterator[tuple[Shape, int]]:
    """(shape, number of records that are not left out) of each run."""
    stop = 0
    for height, width, number in self.shapes:
      start, stop = stop, stop + number
      first, last = np.searchsorted(self.removed, [start, stop]).tolist()
      yield (height, width), number - (last - first)

  def row(self, i: int) -> int:
    """The number in the file of the i-th record that is not left out."""
    # What is left out up to removed[j] moves the others by j + 1.
    before = self.removed - np.arange(len(self.removed))
    return i + int(np.searchsorted(before, i, 'right'))


class Records:
  """The records of files, as one sequence; a file is opened when it is needed.

  Args:
    parts: the files, in order.

  Raises:
    DataError: when indexed, if a file is missing or of another size, or the
      process may open no more files.
    BadSample: when indexed, if the record is damaged.
    OSError: when indexed, if it cannot be read now.
  """

  def __init__(self, parts: Sequence[Part]) -> None:
    self._parts = parts
    self._ends = [*itertools.accumulate(map(len, parts))]
    self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._lock = threading.Lock()

  def __reduce__(self) -> tuple:
    return Records, (self._parts,)

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def place(self, i: int) -> tuple[int, int]:
    """(number of the part, number of the record in its file) of record `i`."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    number = bisect.bisect_right(self._ends, i)
    part = self._parts[number]
    return number, part.row(i - self._ends[number] + len(part))

  def __getitem__(self, i: int) -> bytes:
    number, row = self.place(i)
    try:
      return self._reader(number).read([row])[0]
    except RuntimeError as error:
      with self._lock:  # after an error, a reader gives nothing but that error
        self._open.pop(number, None)
      if _FAILED.search(str(error)):
        raise OSError(str(error)) from error
      raise BadSample('its record is damaged') from error

  def _reader(self, number: int) -> Any:
    """The reader of a part; the one unused for longest makes room for it."""
    with self._lock:
      reader = self._open.get(number)
      if reader is not None:
        self._open.move_to_end(number)
        return reader
    reader = _open(self._parts[number])  # without the lock: it takes a while
    with self._lock:
      self._open[number] = reader
      while len(self._open) > max_open():
        # Closed once the last thread that reads from it is done.
        self._open.popitem(last=False)
    return reader


class Spans(Sequence[int]):
  """Whole numbers in increasing ranges, such as the records of one shape."""

  def __init__(self, ranges: Sequence[range]) -> None:
    self._ranges = ranges
    self._starts = [some.start for some in ranges]
    self._ends = [*itertools.accumulate(map(len, ranges))]

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, i: Any) -> Any:
    if not 0 <= i < len(self):
      raise IndexError(i)
    number = bisect.bisect_right(self._ends, i)
    return self._ranges[number][i - self._ends[number]]

  def index(self, value: int, *_: Any) -> int:
    number = bisect.bisect_right(self._starts, value) - 1
    if number < 0 or value not in self._ranges[number]:
      raise ValueError(f'{value} is not there')
    some = self._ranges[number]
    return self._ends[number] - len(some) + some.index(value)

  def __contains__(self, value: Any) -> bool:
    try:
      return self.index(value) >= 0
    except ValueError:
      return False


def max_open() -> int:
  """Number of files that are kept open: a quarter of what the system allows."""
  allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return MAX_OPEN if allowed < 0 else min(MAX_OPEN, max(1, allowed // 4))


def _open(part: Part) -> Any:
  """The reader of a part."""
  if '://' not in part.path:  # the listing of a bucket has told the sizes
    try:
      right = os.path.getsize(part.path) == part.bytes
    except FileNotFoundError:
      right = False
    if not right:
      raise wrong(part)
  reader = array_record_module.ArrayRecordReader(
    part.path, OPTIONS, file_reader_buffer_size=BUFFER
  )
  if not reader.ok():
    reader.read([0])  # raises, with the reason
  return reader


def wrong(part: Part) -> DataError:
  """The error of a part that is missing or of another size."""
  return DataError(
    f'{part.path} is missing or does not have {part.bytes} bytes, as its set '
    f'states; {files.COPY_AGAIN}.'
  )
