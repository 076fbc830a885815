"""What is in a tar: its samples, found once, for the index.

A key may contain dots if both its image and its caption do (a.b.jpg, a.b.txt);
an a.b.jpg or a.b.txt alone is another column of sample a, and ignored.

Every byte of a tar is read once, for checksums and captions. Of an image only
the header is looked at; whether it decodes is found at its first use.
"""

import collections
import contextlib
import gzip
import os
import shutil
import tarfile
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from imagen_jax.data.checked import UNREADABLE, clean_captions, survey
from imagen_jax.data.tar_index import ROW, SIZE, Found, Tar
from imagen_jax.errors import DataError
from imagen_jax.io import bucket, files, ranges
from imagen_jax.io.decode import SUFFIXES, BadSample, opened, upright_size

MAX_MEMBER = 64 * 2**20  # bytes of one image; a caption is far smaller
MAX_TEXT = 2**20
GZIP = ('.tar.gz', '.tgz')
KINDS = ('.tar', *GZIP)
CAPTION_KEYS = ('caption', 'text', 'captions')
TEXTS = ('.txt', '.json')  # files with the caption, in order of preference
CUT = 'the tar is truncated there'
DAMAGED = 'the tar is damaged there'
WIDEST = np.iinfo(SIZE.base).max


def scan(path: str, name: str, time: int | None = None) -> Found:
  """Finds the samples of a tar, on a disk or in a bucket.

  Args:
    path: of the tar.
    name: its path below the folder of the set.
    time: see `Tar`.

  Raises:
    DataError: it is no tar, or a part of it cannot be read now.
  """
  with on_disk(path) as packed, unzipped(path, packed) as (shard, cut):
    size = os.stat(packed).st_size
    samples, bad = _members(shard, os.stat(shard).st_size, path)
    if cut:
      bad['the rest'] = CUT
    good, wrong = survey(
      [key for key in samples if key not in bad],
      lambda key: _examine(shard, samples[key]),
      f'indexing {path}',
    )
  unread = [key for key, why in wrong.items() if why.startswith(UNREADABLE)]
  if unread:
    raise DataError(
      f'{path}, sample {unread[0]}: {wrong[unread[0]]}; check the disk and the '
      'network, and run the command again.'
    )
  rows = np.array([row for row, _ in good.values()], ROW)
  sizes = np.array([shape for _, shape in good.values()], SIZE.base)
  tar = Tar(name, size, time)
  return Found(tar, rows, sizes.reshape(-1, 2), bad | wrong)


class Plain:
  """Files with the uncompressed tars: themselves, or temporary copies.

  A copy is made at its first use and lasts as long as this object.

  Args:
    copies: {tar: the file} of those that are made already.
  """

  def __init__(self, copies: Mapping[str, str] | None = None) -> None:
    self._copies: dict[str, str] = dict(copies or {})
    self._lock, self._stack = threading.Lock(), contextlib.ExitStack()
    weakref.finalize(self, self._stack.close)

  def __reduce__(self) -> tuple:
    return Plain, ()

  def __getitem__(self, path: str) -> str:
    """The file for a tar.

    Raises:
      DataError: it cannot be read, or there is no room for the copy.
    """
    if not path.endswith(GZIP) and path not in self._copies:
      return path
    with self._lock:
      if path not in self._copies:
        packed = self._stack.enter_context(on_disk(path))
        copy, _ = self._stack.enter_context(unzipped(path, packed))
        self._copies[path] = copy
      return self._copies[path]


@contextlib.contextmanager
def unzipped(path: str, packed: str) -> Iterator[tuple[str, bool]]:
  """A file with the uncompressed tar: `packed`, or a copy while it is needed.

  And whether the compressed one is cut short.

  Raises:
    DataError: it is damaged, or there is no room for the copy.
  """
  if not path.endswith(GZIP):
    yield packed, False
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = os.path.join(folder, 'tar')
    yield copy, _unzip(path, packed, copy)


def _unzip(path: str, packed: str, copy: str) -> bool:
  """Decompresses a tar as far as it goes; returns whether it is cut short."""
  try:
    with gzip.open(packed) as file, open(copy, 'wb') as out:
      try:
        shutil.copyfileobj(file, out)
      except EOFError:
        return True
      return False
  except (gzip.BadGzipFile, zlib.error) as error:
    raise DataError(
      f'{path} is damaged, or no gzip file ({error}); download it again.'
    ) from error
  except OSError as error:
    raise DataError(
      f'{path} cannot be decompressed ({error}); set TMPDIR to a folder with '
      'enough room.'
    ) from error


@contextlib.contextmanager
def on_disk(path: str) -> Iterator[str]:
  """A file that holds the tar: itself, or a copy for as long as is needed."""
  if not bucket.is_bucket(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = os.path.join(folder, path.rpartition('/')[2])
    try:
      bucket.filesystem(path).get_file(path, copy)
    except Exception as error:
      raise bucket.kind_of(error, DataError)(
        f'{path} cannot be read ({bucket.reason(error) or error}); check that '
        'it exists and that this machine may read it.'
      ) from error
    yield copy


def _examine(
  shard: str, sample: Mapping[str, tuple[int, int]]
) -> tuple[tuple, tuple[int, int]]:
  """(the row, the image's width and height) of a sample.

  Raises:
    BadSample: it has no image or caption, or one that is none.
  """
  image = [sample[s] for s in SUFFIXES if s in sample]
  text = [(sample[s], s == '.json') for s in TEXTS if s in sample]
  if not image:
    raise BadSample('it has no image')
  if not text:
    raise BadSample('it has no caption')
  (offset, size), ((where, length), is_json) = image[0], text[0]
  data = whole(ranges.read(shard, offset, size), size)
  captions(whole(ranges.read(shard, where, length), length), is_json)
  with opened(data) as header:
    wide, high = upright_size(header)
  crc = zlib.crc32(data)
  row = offset, where, size, length, crc, is_json
  return row, (min(wide, WIDEST), min(high, WIDEST))


def whole(data: bytes, size: int) -> bytes:
  """The data, if there are as many as there should be."""
  if len(data) < size:
    raise BadSample(CUT)
  return data


def _members(
  shard: str, size: int, where: str
) -> tuple[dict[str, dict[str, tuple[int, int]]], dict[str, str]]:
  """({key: {suffix: (offset, size)}}, {key: what is wrong}), from tar headers.

  A key is a member's name up to its last dot.
  """
  samples: dict[str, dict[str, tuple[int, int]]] = {}
  copies: collections.Counter[tuple[str, str]] = collections.Counter()
  bad: dict[str, str] = {}
  last = None

  def column(key: str) -> bool:
    """Whether a key is 'sample.column', as the names of the others show."""
    start, found = key.rfind('/') + 1, samples[key].keys()
    starts = [key[:i] for i, c in enumerate(key) if c == '.' and i > start]
    pair = found & set(SUFFIXES) and found & set(TEXTS)
    return not pair and any(k in samples or k in bad for k in starts)

  try:
    # 'r:' rejects compressed tars, which have no random access.
    with tarfile.open(shard, 'r:', errorlevel=0) as tar:
      for member in tar:
        if member.isdir():
          continue
        key, suffix = os.path.splitext(member.name.lstrip('/'))
        last, suffix = key, suffix.lower()
        problem = _problem(member, size)
        if problem is None and (
          suffix not in (*SUFFIXES, *TEXTS) or files.is_hidden(member.name)
        ):
          continue  # other columns, such as key.npy, are ignored
        if problem is None and suffix in samples.get(key, {}):
          copies[key, suffix] += 1
          again = copies[key, suffix]
          key += ' (repeated)' if again == 1 else f' (repeated {again})'
          problem = 'another sample has its key'
        if problem:
          bad[key] = problem
        else:
          place = member.offset_data, member.size
          samples.setdefault(key, {})[suffix] = place
        vars(tar)['members'].clear()  # tarfile would keep all members in memory
      # tarfile takes a broken header for the end; a real end is zeros or EOF.
      tar.fileobj.seek(tar.offset)
      if tar.fileobj.read(512).strip(b'\0'):
        bad[f'after {last}'] = DAMAGED
  except tarfile.TarError as error:
    if last is None:
      raise DataError(
        f'{where} is not a tar ({error}); download it again. A compressed one '
        'ends in .tar.gz.'
      ) from error
    if bad.get(last) != CUT:
      bad[f'after {last}'] = DAMAGED
  return {k: v for k, v in samples.items() if not column(k)}, bad


def _problem(member: tarfile.TarInfo, size: int) -> str | None:
  """Why a member is not usable, or None."""
  if files.inside('', member.name) is None:
    return 'its name points outside the tar'
  if not member.isreg() or member.issparse():
    return 'it is a link or another special file'
  if member.size > MAX_MEMBER:
    return f'it is larger than {MAX_MEMBER // 2**20} MB'
  if member.offset_data + member.size > size:
    return CUT
  return None


def captions(data: bytes, is_json: bool) -> tuple[str, ...]:
  """The captions of a sample's .txt (one) or .json; raises BadSample."""
  if len(data) > MAX_TEXT:
    raise BadSample('its caption is longer than a megabyte')
  found: Any = data
  if is_json:
    try:
      record = files.parse_json(data)
      found = next(record[key] for key in CAPTION_KEYS if record.get(key))
    except (ValueError, TypeError, AttributeError) as error:
      raise BadSample('its .json is broken') from error
    except StopIteration:
      raise BadSample('it has no caption') from None
  return clean_captions(found)
