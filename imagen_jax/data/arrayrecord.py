"""Prepared data: resized images and captions, perhaps with embeddings.

  mine/dataset.json               the header; written last, when all is complete
  mine/part-00000.array_record    records, each with its own checksum
  mine/part-00000.json            its report, see `prepare.prepare_shard`
  mine/duplicates.u32             records that are left out, if there are any:
                                  their numbers in the parts, part after part

A record is the length of its header (4 bytes), the header as JSON (the captions
of the image, its height and width), and the image as pixels or encoded
(`encode` of dataset.json). It contains no code. Embeddings of the captions lie
in files of their own, see `embeddings`.
"""

import functools
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from imagen_jax.data import embeddings
from imagen_jax.data.checked import CLEANING, MAX_BAD, Checked, captioned
from imagen_jax.data.claim import SPEC
from imagen_jax.data.embeddings import Embeddings
from imagen_jax.data.encoding import RAW, Encoding
from imagen_jax.data.records import Part, Records, Spans, wrong
from imagen_jax.data.shards import FORMAT_VERSION
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import bucket, files
from imagen_jax.io.aspect import Shape
from imagen_jax.io.decode import BadSample, fit
from imagen_jax.io.files import AnyPath

DATASET, DUPLICATES = 'dataset.json', 'duplicates.u32'


class ArrayRecordSource(Checked):
  """Random access to data written by imagen-prepare.

  Args:
    path: the folder of a set, or a pattern such as 'data/part-*' of several,
      which are concatenated.
    size: side of the images in pixels, at most the prepared size; a smaller
      one takes the mean over each target pixel's area.
    max_bad: see `Checked`.
    text: which embeddings of the captions to read, see `embeddings.find`. With
      them an example has `text` and `mask` too, see `Embeddings.example`.

  Attributes:
    header: `dataset.json` of the first set.

  Raises:
    DataError: a set is missing, unfinished, damaged, of a newer format or too
      small, or the sets differ in size or text.
    UsageError: there are not the embeddings that `text` names.
  """

  path_is = 'what imagen-prepare wrote'
  in_bucket = True

  def __init__(
    self,
    path: AnyPath,
    size: int,
    *,
    max_bad: float = MAX_BAD,
    text: str | None = None,
  ) -> None:
    self._text = text
    super().__init__(path, size, max_bad=max_bad)

  def scan(self, path: AnyPath) -> tuple[dict[str, str], dict[str, str]]:
    folders = _folders(path)
    self._headers = [_read_header(folder) for folder in folders]
    self.header = self._headers[0]
    self._encoding = _encoding(folders[0], self.header)
    sets: list[tuple[dict[str, Any], list[Part]]] = []
    for folder, header in zip(folders, self._headers):
      self._check(folder, header)
      sets.append((header, [*_parts(folder, header)]))
    parts = [part for _, parts in sets for part in parts]
    self._records = Records(parts)
    self._embeddings = self._find_text(folders, sets)
    self.buckets = self._find_buckets(parts)
    return {}, {}

  def _find_buckets(self, parts: Sequence[Part]) -> dict[Shape, Spans]:
    """`buckets` at `self.size`; empty if all images are squares.

    Raises:
      DataError: a shape has no whole pixels at that size.
    """
    runs: dict[Shape, list[range]] = {}
    start = 0
    for part in parts:
      for shape, number in part.runs():
        if number:
          runs.setdefault(shape, []).append(range(start, start + number))
        start += number
    side = self.header['size']
    if set(runs) <= {(side, side)}:
      return {}
    for shape in runs:
      if any(n * self.size % side for n in shape):
        raise DataError(
          f'{self.where} has images of {shape[1]} × {shape[0]} pixels, which '
          f'cannot be resized from {side} to {self.size}; take a size that '
          f'8 divides, or prepare it again with --size {self.size}.'
        )
    return {
      (h * self.size // side, w * self.size // side): Spans(some)
      for (h, w), some in sorted(runs.items())
    }

  def _find_text(
    self,
    folders: Sequence[pathlib.Path],
    sets: Sequence[tuple[dict[str, Any], list[Part]]],
  ) -> Embeddings | None:
    """The embeddings of all sets, if they are wanted and there."""
    found = [embeddings.find(folder, self._text) for folder in folders]
    without = [folder for folder, text in zip(folders, found) if text is None]
    if len(without) == len(found):
      return None
    if without or len(set(found)) < len(found):
      raise DataError(
        f'{(without or folders)[0]} has no embeddings of its own, and another '
        'set has; make them with imagen-embed, or set data.text=None.'
      )
    made = Embeddings([text for text in found if text], sets)
    self.text_header = made.header
    return made

  def _check(self, folder: pathlib.Path, header: Mapping[str, Any]) -> None:
    """Checks that a set is large enough, and prepared like the first."""
    if self.size > header['size']:
      raise DataError(
        f'{folder} was prepared at {header["size"]} pixels and {self.size} are '
        f'needed; prepare it again with imagen-prepare --size {self.size}.'
      )
    for key in ('size', 'encode', 'quality'):
      if header[key] != self.header[key]:
        raise DataError(
          f'{folder} was prepared with another {key} than the first set of '
          f'{self.where}; prepare them with the same '
          'settings, or give the path of one.'
        )

  def __len__(self) -> int:
    return len(self._records)

  @property
  def fingerprint(self) -> str:
    """sha256 of the headers, which hold the parts' digests."""
    # A single set keeps the fingerprint that earlier runs recorded.
    what = self._headers if len(self._headers) > 1 else self.header
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()

  def name(self, i: int) -> str:
    return f'record {i}'

  def example(self, i: int) -> dict[str, Any]:
    record = self._records[i]
    try:
      header, pixels = unpack(record)
      height, width = header['shape']
      image = self._encoding.decode(pixels, height, width)
      example = {'image': image} | captioned(header['captions'])
      if self._embeddings is not None:
        example |= self._embeddings.example(i, len(header['captions']))
    except (ValueError, LookupError, TypeError) as error:
      raise BadSample('its record is damaged') from error
    side = self.header['size']
    if side != self.size:
      height, width = (n * self.size // side for n in image.shape[:2])
      example['image'] = fit(Image.fromarray(image), width, height)
    return example

  def check_text(self, **wanted: Any) -> None:
    have = self.text_header or {}
    here = f'{self.where} holds'
    there = 'text.path, text.max_len and text.dtype give'
    embeddings.check(have, wanted | {'cleaning': CLEANING}, here, there)


def write_records(
  file: pathlib.Path, records: Iterable[bytes]
) -> tuple[int, files.Digest]:
  """Writes records to a file, all or none, on a disk or in a bucket.

  Returns:
    (their number, size and digest of the file).

  Raises:
    DataError: they could not be written, as on a full disk.
  """

  def attempt(step: Callable[..., Any], *args: Any) -> None:
    try:
      step(*args)
    except RuntimeError as error:
      raise DataError(
        f'{file} could not be written ({error}); free space there and repeat '
        'the command.'
      ) from error

  count = 0
  with files.replacing(file) as temporary:
    # One record per group, for random access to single records.
    writer = array_record_module.ArrayRecordWriter(
      str(temporary), 'group_size:1'
    )
    for record in records:
      attempt(writer.write, record)
      count += 1
    attempt(writer.close)
    _verify(temporary, count)
    written = files.digest(temporary)
  return count, written


def _verify(file: pathlib.Path, count: int) -> None:
  """Reads the count back: the writer does not report a full disk."""
  reader = array_record_module.ArrayRecordReader(str(file))
  found = reader.num_records() if count else 0
  reader.close()
  if found != count:
    raise DataError(
      f'{file} holds {found} of {count} records after writing; free space '
      'there and repeat the command.'
    )


def pack(example: Mapping[str, Any], encoding: Encoding = RAW) -> bytes:
  """A record of an example.

  Args:
    example: `image` uint8 [h, w, 3] or of Pillow, `caption` or a sequence of
      `captions`, and the encoded `file` if there is one.
    encoding: of the image.
  """
  image = example['image']
  pixels = encoding.encode(image, example.get('file'))
  array = isinstance(image, np.ndarray)
  header = {
    'captions': list(example.get('captions') or [example['caption']]),
    'shape': image.shape[:2] if array else image.size[::-1],
    'image': len(pixels),
  }
  head = json.dumps(header).encode()
  return len(head).to_bytes(4, 'little') + head + pixels


def unpack(record: bytes) -> tuple[dict[str, Any], memoryview]:
  """(header, pixels) of a record; the pixels are a view."""
  start = 4 + int.from_bytes(record[:4], 'little')
  header = files.parse_json(record[4:start])
  if start + header['image'] != len(record):
    raise ValueError('its length is wrong')
  return header, memoryview(record)[start:]


def read_set(
  folder: pathlib.Path,
) -> tuple[dict[str, Any], list[Part], dict[str, DataError]]:
  """A prepared set, of which parts may be missing.

  Returns:
    (header, parts that hold records, {path: the error} of those of them that
    are missing or, in a bucket, of another size).

  Raises:
    DataError: the set is missing, unfinished or of a newer format.
  """
  header, missing = _read_header(folder), dict[str, DataError]()
  return header, [*_parts(folder, header, missing)], missing


def _folders(path: AnyPath) -> list[pathlib.Path]:
  """The folders that a path or pattern names, on a disk or in a bucket."""
  text = os.fspath(path)
  if not bucket.is_bucket(text):
    found = [] if os.path.exists(text) else sorted(glob.glob(text))
    return [*map(pathlib.Path, found or [text])]
  scheme = text.partition('://')[0]
  if scheme != 'gs':
    raise UsageError(
      f'data.path {text}: prepared data are read from gs:// and from disks; '
      'mount the bucket, or copy them.',
      key='config.data.path',
    )
  found = [text]
  if glob.has_magic(text):
    names = sorted(bucket.filesystem(text).glob(text.rstrip('/')))
    found = [f'{scheme}://{name}' for name in names] or found
  return [bucket.at(folder) for folder in found]


def _parts(
  folder: pathlib.Path,
  header: Mapping[str, Any],
  missing: dict[str, DataError] | None = None,
) -> Iterator[Part]:
  """A set's parts that hold records.

  One listing finds those that are missing. A bucket's has the sizes too; on a
  disk a part's size is checked when it is opened, since asking for 5,000 of
  them at each start takes minutes on a network file system.

  Args:
    folder, header: of the set.
    missing: gets {path: the error} of what is missing; None: it is raised.

  Raises:
    DataError: a part is missing, or outside the folder.
  """
  url = os.fspath(folder)
  there: Mapping[str, int | None]
  if bucket.is_bucket(url):
    there = files.tree(url)
  else:
    there = {entry.name: None for entry in os.scandir(folder)}
  removed, at = _removed(folder, header), 0
  for entry in header['parts']:
    if files.inside('', entry['name']) is None:
      raise DataError(
        f'{folder / DATASET} names a file outside its folder, '
        f'{entry["name"]!r}; {files.COPY_AGAIN}.'
      )
    number = entry.get('removed', 0)
    part = Part(
      f'{url}/{entry["name"]}',
      entry['bytes'],
      entry['count'],
      removed=removed[at : at + number],
      shapes=entry['buckets'],
    )
    at += number
    if there.get(entry['name'], -1) not in (None, part.bytes):
      if missing is None:
        raise wrong(part)
      missing[part.path] = wrong(part)
    if len(part) != sum(number for _, number in part.runs()):
      raise DataError(
        f'{folder / DATASET} has other numbers of shapes than of records of '
        f'{entry["name"]}; {files.COPY_AGAIN}.'
      )
    if len(part):
      yield part


def _removed(folder: pathlib.Path, header: Mapping[str, Any]) -> np.ndarray:
  """The numbers of the records that are left out, part after part.

  Raises:
    DataError: they are not as many as the parts have.
  """
  number = sum(entry.get('removed', 0) for entry in header['parts'])
  file = folder / DUPLICATES
  try:
    data = file.read_bytes() if number else b''
  except FileNotFoundError:
    data = b''
  if len(data) != 4 * number:
    raise DataError(
      f'{file} is missing or does not have {4 * number} bytes, as its set '
      f'states; {files.COPY_AGAIN}.'
    )
  return np.frombuffer(data, '<u4')


def _read_header(path: pathlib.Path) -> dict[str, Any]:
  if not (path / DATASET).exists():
    if (path / SPEC).exists():
      raise DataError(
        f'{path} is not finished; repeat its imagen-prepare command, which '
        'resumes it, or join its parts with imagen-prepare --merge.'
      )
    raise DataError(
      f'{path} is not prepared data: it has no {DATASET}; check the path, or '
      'prepare it with imagen-prepare.'
    )
  header = files.read_json(
    path / DATASET, error=DataError, version=FORMAT_VERSION
  )
  check_keys = functools.partial(files.check_keys, path / DATASET)
  check_keys(header, size=int, count=int, parts=list, encode=str)
  for part in header['parts']:
    check_keys(part, name=str, bytes=int, count=int, buckets=list)
    for run in part['buckets']:
      named = dict(zip('hwn', run)) if isinstance(run, list) else {}
      check_keys(named, h=int, w=int, n=int)
  return header


def _encoding(folder: pathlib.Path, header: Mapping[str, Any]) -> Encoding:
  kind, quality = header['encode'], header.get('quality')
  try:
    return Encoding(kind, quality)
  except (UsageError, TypeError) as error:
    raise DataError(
      f'{folder / DATASET}: images are encoded as {kind!r} of quality '
      f'{quality!r}, which this version of imagen_jax does not read: upgrade, '
      f'or {files.COPY_AGAIN}.'
    ) from error
