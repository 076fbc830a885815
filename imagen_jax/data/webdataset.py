"""Webdataset tars, as img2dataset writes them: key.jpg, key.txt, key.json.

A key may contain dots if both its image and its caption do (a.b.jpg, a.b.txt);
an a.b.jpg or a.b.txt alone is another column of sample a, and ignored.

A tar is read through an index of offsets, so any sample is one seek away and
nothing is extracted, unpickled or piped through a shell. Building the index
reads every image once, which finds the bad ones. The index is kept in the
user's cache directory, with a checksum of each image to detect later changes.
"""

import collections
import glob
import hashlib
import os
import pathlib
import re
import tarfile
import zlib
from collections.abc import Mapping
from typing import IO

import numpy as np

from imagen_jax.data import index_cache
from imagen_jax.data.checked import Checked, clean_caption, survey
from imagen_jax.errors import DataError
from imagen_jax.io import files
from imagen_jax.io.decode import SUFFIXES, BadSample, inspect
from imagen_jax.io.files import AnyPath

MAX_MEMBER = 64 * 2**20  # bytes of one image; a caption is far smaller
MAX_TEXT = 2**20
CAPTION_KEYS = ('caption', 'text')
TEXTS = ('.txt', '.json')  # files with the caption, in order of preference
CUT = 'the tar is truncated there'
# Columns of the index, which has one row per good sample.
COLUMNS = 'image image_size text text_size is_json width height crc'.split()


class WebDatasetSource(Checked):
  """Random access to the images of tars, {'image', 'caption'} each.

  The caption is the sample's .txt, or else "caption" or "text" of its .json.

  Args:
    path: a tar, a folder of tars, or a pattern such as 'shards/*.tar' or
      'shards/{00000..00099}.tar'; the others are `Checked`'s.

  Attributes:
    shards: the tars, sorted by name.
    tars: the same, relative to their common folder.

  Raises:
    DataError: there is no tar, a file is not a tar, no image is usable, or too
      many are bad.
  """

  path_is = "tars, such as 'shards/*.tar'"

  needs = 'Its tars need images with a .txt or .json of the same name.'

  def scan(self, path: AnyPath) -> tuple[dict[str, str], list[str]]:
    self.shards = find_shards(path)
    bad: dict[str, str] = {}
    small: list[str] = []
    rows: list[np.ndarray] = []
    root = os.path.commonpath([os.path.dirname(s) for s in self.shards])
    self.tars = [os.path.relpath(shard, root or '.') for shard in self.shards]
    for number, (shard, tar) in enumerate(zip(self.shards, self.tars)):
      found, wrong = _index(shard)
      bad |= {f'{tar}/{key}': reason for key, reason in wrong.items()}
      large = found[:, 5:7].min(axis=1) >= self.size
      small += [f'{tar}{_member(shard, row[0])}' for row in found[~large]]
      rows.append(np.insert(found[large], 0, number, axis=1))
    self.rows = np.concatenate(rows)
    return bad, small

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def fingerprint(self) -> str:
    """sha256 of the index: all offsets, and every image's checksum."""
    return hashlib.sha256(self.rows.tobytes()).hexdigest()

  def name(self, i: int) -> str:
    shard, offset = self.rows[i][:2]
    return f'{self.tars[shard]}{_member(self.shards[shard], offset)}'

  def read(self, i: int) -> tuple[bytes, str]:
    shard, image, image_size, text, text_size, is_json, *_, crc = self.rows[i]
    with open(self.shards[shard], 'rb') as file:
      data = _read_at(file, image, image_size)
      caption = _caption(_read_at(file, text, text_size), is_json)
    if zlib.crc32(data) != crc:
      raise BadSample('it has changed since it was indexed')
    return data, caption


def find_shards(path: AnyPath) -> tuple[str, ...]:
  """The tars that a path or pattern matches, as a sorted tuple of names.

  Raises:
    DataError: there are none.
  """
  path = str(path)
  if path.startswith('pipe:'):
    raise DataError(
      f'{path} would run a shell command, which imagen_jax never does; '
      'download the tars and give their path.'
    )
  if os.path.isdir(path):
    pattern = os.path.join(glob.escape(path), '**', '*.tar')
    found = glob.glob(pattern, recursive=True)
  else:
    found = [
      name
      for pattern in _braces(path)
      for name in ([pattern] if os.path.exists(pattern) else glob.glob(pattern))
    ]
  found = sorted(set(found))
  if not found:
    raise DataError(
      f'there is no tar at {path}; give a tar, a folder of tars, or a quoted '
      "pattern such as 'shards/*.tar'."
    )
  return tuple(found)


def _braces(pattern: str) -> list[str]:
  """'a{00..02}' -> a00, a01, a02, as a shell would."""
  match = re.search(r'\{(\d+)\.\.(\d+)\}', pattern)
  if not match:
    return [pattern]
  first, last = match.groups()
  numbers = range(int(first), int(last) + 1)
  head, tail = pattern[: match.start()], pattern[match.end() :]
  return [
    name
    for number in numbers
    for name in _braces(f'{head}{number:0{len(first)}d}{tail}')
  ]


def _index(shard: str) -> tuple[np.ndarray, dict[str, str]]:
  """(int64 rows [n, len(COLUMNS)], {key: what is wrong}) of one tar."""
  stat = os.stat(shard)

  def examine(sample: Mapping[str, tuple[int, int]]) -> list[int]:
    image = [sample[s] for s in SUFFIXES if s in sample]
    text = [(sample[s], s == '.json') for s in TEXTS if s in sample]
    if not image:
      raise BadSample('it has no image')
    if not text:
      raise BadSample('it has no caption')
    (offset, size), ((where, length), is_json) = image[0], text[0]
    with open(shard, 'rb') as file:
      data = _read_at(file, offset, size)
      _caption(_read_at(file, where, length), is_json)
    sides = inspect(data)
    return [offset, size, where, length, is_json, *sides, zlib.crc32(data)]

  def make() -> tuple[list[list[int]], dict[str, str]]:
    samples, bad = _members(shard, stat.st_size)
    keys = [key for key in samples if key not in bad]
    found, wrong = survey(
      keys, lambda key: examine(samples[key]), f'indexing {shard}'
    )
    return list(found.values()), bad | wrong

  location = pathlib.Path(shard).resolve()
  state = [stat.st_size, stat.st_mtime_ns]
  return index_cache.cached('tar', location, state, len(COLUMNS), make)


def _members(
  shard: str, size: int
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
        bad[f'after {last}'] = 'the tar is damaged there'
  except tarfile.TarError as error:
    if last is None:
      raise DataError(
        f'{shard} is not an uncompressed tar ({error}); download it again, or '
        'decompress it.'
      ) from error
    if bad.get(last) != CUT:
      bad[f'after {last}'] = 'the tar is damaged there'
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


def _member(shard: str, offset: int) -> str:
  """'/member', from the member's header, 512 bytes before its data."""
  try:
    with open(shard, 'rb') as file:
      header = _read_at(file, offset - 512, 512)
    return f'/{tarfile.TarInfo.frombuf(header, "utf-8", "replace").name}'
  except (OSError, BadSample, tarfile.TarError):
    return f' at byte {offset}'


def _read_at(file: IO[bytes], offset: int, size: int) -> bytes:
  file.seek(int(offset))
  data = file.read(int(size))
  if len(data) < size:
    raise BadSample(CUT)
  return data


def _caption(data: bytes, is_json: bool) -> str:
  if len(data) > MAX_TEXT:
    raise BadSample('its caption is longer than a megabyte')
  if is_json:
    try:
      record = files.parse_json(data)
      data = next(record[key] for key in CAPTION_KEYS if record.get(key))
    except (ValueError, TypeError, AttributeError) as error:
      raise BadSample('its .json is broken') from error
    except StopIteration:
      raise BadSample('it has no caption') from None
    if not isinstance(data, str):
      raise BadSample('its caption is not text')
  return clean_caption(data)
