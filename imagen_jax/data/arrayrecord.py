"""Prepared data: resized images, captions and, if asked for, T5 embeddings.

  mine/dataset.json               the header; written last, when all is complete
  mine/part-00000.array_record    records, each with its own checksum
  mine/part-00000.json            its count, size, sha256 and skipped samples
  mine/dropped.jsonl              all skipped samples, with reasons

A record is the length of its header (4 bytes), the header as JSON (the captions
of the image, its height and width), the image as pixels or encoded (`encode` of
dataset.json), and the embeddings of the caption's tokens in bfloat16, without
padding. It contains no code.
"""

import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python import array_record_module
from PIL import Image

from imagen_jax.data.checked import CLEANING, MAX_BAD, Checked, captioned
from imagen_jax.data.encoding import RAW, Encoding
from imagen_jax.data.records import Part, Records, Spans, wrong
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import bucket, files
from imagen_jax.io.aspect import Shape
from imagen_jax.io.decode import BadSample, fit
from imagen_jax.io.files import AnyPath

FORMAT_VERSION = 3
DATASET, UNFINISHED = 'dataset.json', 'unfinished.json'


class ArrayRecordSource(Checked):
  """Random access to data written by imagen-prepare.

  Args:
    path: the folder of a set, or a pattern such as 'data/part-*' of several,
      which are concatenated.
    size: side of the images in pixels, at most the prepared size; a smaller
      one takes the mean over each target pixel's area.
    max_bad: see `Checked`.

  Attributes:
    header: `dataset.json` of the first set; its `text` is None, or the `dim`,
      `max_len` and digests of the embeddings. With embeddings an example also
      has `text` bfloat16 [max_len, dim], zeros at padding, and `mask` bool
      [max_len].

  Raises:
    DataError: a set is missing, unfinished, damaged, of a newer format or too
      small, or the sets differ in size or text.
  """

  path_is = 'what imagen-prepare wrote'
  in_bucket = True

  def __init__(
    self, path: AnyPath, size: int, *, max_bad: float = MAX_BAD
  ) -> None:
    super().__init__(path, size, max_bad=max_bad)

  def scan(self, path: AnyPath) -> tuple[dict[str, str], dict[str, str]]:
    folders = _folders(path)
    self._headers = [_read_header(folder) for folder in folders]
    self.header = self._headers[0]
    self.text_header = self.header['text']
    self._encoding = _encoding(folders[0], self.header)
    parts: list[Part] = []
    runs: dict[Shape, list[range]] = {}
    for folder, header in zip(folders, self._headers):
      self._check(folder, header)
      before = sum(part.count for part in parts)
      for shape, run in _runs(header['parts'], before):
        runs.setdefault(shape, []).append(run)
      parts += _parts(folder, header)
    self._records = Records(parts)
    self.buckets = self._scaled(runs)
    return {}, {}

  def _scaled(
    self, runs: Mapping[Shape, Sequence[range]]
  ) -> dict[Shape, Sequence[int]]:
    """`buckets` at `self.size`; empty if all images are squares.

    Raises:
      DataError: a shape has no whole pixels at that size.
    """
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

  def _check(self, folder: pathlib.Path, header: Mapping[str, Any]) -> None:
    """Checks that a set is large enough, and prepared like the first."""
    if self.size > header['size']:
      raise DataError(
        f'{folder} was prepared at {header["size"]} pixels and {self.size} are '
        f'needed; prepare it again with imagen-prepare --size {self.size}.'
      )
    for key in ('size', 'text', 'encode', 'quality'):
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
      header, pixels, text = _unpack(record)
      height, width = header['shape']
      image = self._encoding.decode(pixels, height, width)
      example = {'image': image} | captioned(header['captions'])
      if self.header['text'] is not None:
        example |= _padded(text, **self.header['text'])
    except (ValueError, LookupError, TypeError) as error:
      raise BadSample('its record is damaged') from error
    side = self.header['size']
    if side != self.size:
      height, width = (n * self.size // side for n in image.shape[:2])
      example['image'] = fit(Image.fromarray(image), width, height)
    return example

  def check_text(self, *, encoder: str, tokenizer: str, max_len: int) -> None:
    """Checks that the stored embeddings are of the run's text encoder.

    Args:
      encoder, tokenizer: digests of the run's.
      max_len: the run's number of text positions.

    Raises:
      DataError: they differ; the message names the key.
    """
    mine = {
      'encoder': encoder,
      'tokenizer': tokenizer,
      'max_len': max_len,
      'cleaning': CLEANING,
    }
    for key, value in mine.items():
      stored = self.header['text'][key]
      if stored != value:
        raise DataError(
          f'{self.where} holds embeddings of another {key} ({short(stored)}) '
          f'than text.path and text.max_len give ({short(value)}); prepare '
          'it again with imagen-prepare --text, or set those to what it was '
          'prepared with.'
        )


def _runs(
  parts: Sequence[Mapping[str, Any]], start: int
) -> Iterator[tuple[Shape, range]]:
  """(shape, records) of each run of records of one shape, of a set's parts.

  Args:
    parts: of its header; `shapes` has [height, width, number of records].
    start: number of the set's first record.
  """
  for part in parts:
    for height, width, number in part['shapes']:
      if number:
        yield (height, width), range(start, start + number)
      start += number


def write_records(file: pathlib.Path, records: Iterable[bytes]) -> int:
  """Writes records to a file, all or none; returns their number.

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
  return count


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


def pack(
  example: Mapping[str, Any],
  text: np.ndarray | None,
  encoding: Encoding = RAW,
) -> bytes:
  """A record of an example and its caption's embeddings (or None).

  Args:
    example: `image` uint8 [h, w, 3], and `caption` or a sequence of `captions`.
    text: [tokens, dim].
    encoding: of the image.
  """
  pixels = encoding.encode(example['image'])
  header = {
    'captions': list(example.get('captions') or [example['caption']]),
    'shape': example['image'].shape[:2],
    'image': len(pixels),
  }
  head = json.dumps(header).encode()
  rows = b'' if text is None else np.ascontiguousarray(text).tobytes()
  return len(head).to_bytes(4, 'little') + head + pixels + rows


def _unpack(record: bytes) -> tuple[dict[str, Any], memoryview, memoryview]:
  """(header, pixels, embeddings) of a record, as bytes-like views."""
  start = 4 + int.from_bytes(record[:4], 'little')
  header = files.parse_json(record[4:start])
  end = start + header['image']
  return header, memoryview(record)[start:end], memoryview(record)[end:]


def _padded(
  text: memoryview, *, dim: int, max_len: int, **_: Any
) -> dict[str, np.ndarray]:
  """{'text': [max_len, dim], 'mask': [max_len]} of unpadded bytes."""
  rows = np.frombuffer(text, ml_dtypes.bfloat16).reshape(-1, dim)
  full = np.zeros((max_len, dim), ml_dtypes.bfloat16)
  full[: len(rows)] = rows
  return {'text': full, 'mask': np.arange(max_len) < len(rows)}


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


def _parts(folder: pathlib.Path, header: Mapping[str, Any]) -> Iterator[Part]:
  """A set's parts that hold records.

  One listing finds those that are missing. A bucket's has the sizes too; on a
  disk a part's size is checked when it is opened, since asking for 5,000 of
  them at each start takes minutes on a network file system.

  Raises:
    DataError: one is missing, or outside the folder.
  """
  url = os.fspath(folder)
  there: Mapping[str, int | None]
  if bucket.is_bucket(url):
    there = files.tree(url)
  else:
    there = {entry.name: None for entry in os.scandir(folder)}
  for entry in header['parts']:
    if files.inside('', entry['name']) is None:
      raise DataError(
        f'{folder / DATASET} names a file outside its folder, '
        f'{entry["name"]!r}; {files.COPY_AGAIN}.'
      )
    part = Part(f'{url}/{entry["name"]}', entry['bytes'], entry['count'])
    if there.get(entry['name'], -1) not in (None, part.bytes):
      raise wrong(part)
    if part.count:
      yield part


def _read_header(path: pathlib.Path) -> dict[str, Any]:
  if not (path / DATASET).exists():
    if (path / UNFINISHED).exists():
      raise DataError(
        f'{path} is not finished; repeat its imagen-prepare command, which '
        'resumes it.'
      )
    raise DataError(
      f'{path} is not prepared data: it has no {DATASET}; check the path, or '
      'prepare it with imagen-prepare.'
    )
  header = files.read_json(
    path / DATASET, error=DataError, version=FORMAT_VERSION
  )
  _check_keys(path / DATASET, header, size=int, count=int, parts=list)
  _check_keys(path / DATASET, header, text=dict | None, encode=str)
  for part in header['parts']:
    _check_keys(
      path / DATASET, part, name=str, bytes=int, count=int, shapes=list
    )
  if header['text'] is not None:
    whole, text = ('dim', 'max_len'), ('encoder', 'tokenizer', 'cleaning')
    types = dict.fromkeys(whole, int) | dict.fromkeys(text, str)
    _check_keys(path / DATASET, header['text'], **types)
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


def _check_keys(file: pathlib.Path, found: Any, **types: Any) -> None:
  """Raises DataError if an object of a header lacks a key, or its type."""
  for key, kind in types.items():
    if not isinstance(found, dict) or not isinstance(found.get(key, ...), kind):
      raise DataError(
        f'{file} lacks {key!r}, or has another type of value there; '
        f'{files.COPY_AGAIN}.'
      )


def short(value: Any) -> Any:
  """The first 12 characters of a string; anything else unchanged."""
  return value[:12] if isinstance(value, str) else value
