"""Prepared data: images resized once, captions, and T5 embeddings if asked.

  mine/dataset.json               what it is; written last, so it means whole
  mine/part-00000.array_record    records, each with a checksum of its own
  mine/part-00000.json            its count, size, sha256 and what it left out
  mine/dropped.jsonl              everything that was left out, and why

A record is the length of its header (4 bytes), the header as JSON, the pixels
as bytes, and the embeddings of the caption's tokens in bfloat16, no padding
stored. Nothing in it is code.
"""

import concurrent.futures
import glob
import hashlib
import json
import os
import pathlib

import ml_dtypes
import numpy as np
from array_record.python import array_record_data_source, array_record_module
from PIL import Image

from imagen_jax.data.checked import CLEANING, MAX_BAD, Checked
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io.decode import BadSample, resize_square

FORMAT_VERSION = 1
DATASET, UNFINISHED, DROPPED = (
  'dataset.json',
  'unfinished.json',
  'dropped.jsonl',
)
BATCH = 64  # samples read, and captions embedded, at a time


class ArrayRecordSource(Checked):
  """Random access to what imagen-prepare wrote.

  Args:
    path: its folder; a pattern such as 'data/part-*' takes several, prepared
      side by side, one after the other.
    size: side of the images in pixels, at most the prepared one; less is
      the mean over each target pixel's area.
    max_bad: see `Checked`.

  Attributes:
    header: `dataset.json`, of the first; its `text` is None, or the `dim`,
      `max_len` and digests of the embeddings. With embeddings an example also
      has `text` bfloat16 [max_len, dim], zeros at padding, and `mask` bool
      [max_len].

  Raises:
    DataError: the set is missing, unfinished, damaged, newer, or too small, or
      several differ in size or text.
  """

  path_is = 'what imagen-prepare wrote'

  def __init__(self, path, size, *, max_bad=MAX_BAD):
    self.path = path
    folders = [pathlib.Path(path)]
    if not folders[0].exists():
      folders = [*map(pathlib.Path, sorted(glob.glob(str(path))))] or folders
    self._headers = [_read_header(folder) for folder in folders]
    self.header = self._headers[0]
    self.text_header = self.header['text']
    files = []
    for folder, header in zip(folders, self._headers):
      self._check(folder, header, size)
      files += _files(folder, header)
    self._records = (
      array_record_data_source.ArrayRecordDataSource(files) if files else ()
    )
    super().__init__(str(path), size, 'area', max_bad, {})

  def _check(self, folder, header, size):
    """Refuses a set that is too small or unlike the first."""
    if size > header['size']:
      raise DataError(
        f'{folder} was prepared at {header["size"]} pixels and {size} are '
        f'needed; prepare it again with imagen-prepare --size {size}.'
      )
    for key in ('size', 'text'):
      if header[key] != self.header[key]:
        raise DataError(
          f'{folder} was prepared with another {key} than the first set of '
          f'{self.path}; prepare them alike, or name one of them.'
        )

  def __len__(self):
    return len(self._records)

  @property
  def fingerprint(self):
    """sha256 of the parts' digests and of what made them."""
    # A single set keeps the fingerprint that earlier runs have noted.
    what = self._headers if len(self._headers) > 1 else self.header
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()

  def name(self, i):
    return f'record {i}'

  def example(self, i):
    try:
      record = self._records[i]
      header, pixels, text = _unpack(record)
      side = self.header['size']
      image = np.frombuffer(pixels, np.uint8).reshape(side, side, 3)
    except (RuntimeError, ValueError, KeyError) as error:
      raise BadSample('its record is damaged') from error
    if side != self.size:
      image = resize_square(Image.fromarray(image), self.size)
    example = {'image': image, 'caption': header['caption']}
    if self.header['text'] is not None:
      example |= _padded(text, **self.header['text'])
    return example

  def check_text(self, *, encoder, tokenizer, max_len):
    """Refuses stored embeddings that are not the run's text encoder's.

    Args:
      encoder, tokenizer: digests of the run's.
      max_len: its number of text positions.

    Raises:
      DataError: naming what differs.
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
          f'{self.path} holds embeddings of another {key} ({_short(stored)}) '
          f'than text.path and text.max_len give ({_short(value)}); prepare '
          'it again with imagen-prepare --text, or set those to what it was '
          'prepared with.'
        )


def write(
  source,
  out,
  *,
  settings,
  size,
  text=None,
  embed=None,
  number=None,
  part_size=2048,
  progress=None,
):
  """Writes a source as prepared data, or continues where that was cut off.

  Args:
    source: of examples at `size`.
    out: folder, new, or with the beginning of the same set.
    settings: JSON-ready dict of what else tells this set from another.
    size: side of the images in pixels.
    text: the header's entry on embeddings, None for none.
    embed: list of captions -> list of bfloat16 [tokens, dim].
    number: how many of the source's samples to write; all by default.
    part_size: samples of a part.
    progress: `Progress`, or None.

  Returns:
    (the header, [(name, reason)] of what was left out).

  Raises:
    UsageError: `out` holds something else.
    DataError: a part could not be written or too much is bad.
  """
  out = pathlib.Path(out)
  number = len(source) if number is None else min(number, len(source))
  header = {
    'format_version': FORMAT_VERSION,
    'size': size,
    'cleaning': CLEANING,
    'text': text,
    'of': number,
    'part_size': part_size,
    'settings': settings,
  }
  _claim(out, header)
  parts = []
  for start in range(0, number, part_size):
    indices = range(start, min(start + part_size, number))
    file = out / f'part-{len(parts):05d}.array_record'
    part = _finished(file)
    if part is None:
      part = _write_part(file, source, indices, embed, progress)
    elif progress is not None:
      progress.add(len(indices))
    parts.append(part)
  dropped = [*source.skipped]
  dropped += [entry for part in parts for entry in part.pop('dropped')]
  lines = [json.dumps({'name': n, 'reason': r}) + '\n' for n, r in dropped]
  _write_whole(out / DROPPED, ''.join(lines))
  header |= {'count': sum(part['count'] for part in parts), 'parts': parts}
  _write_whole(out / DATASET, json.dumps(header, indent=2) + '\n')
  (out / UNFINISHED).unlink(missing_ok=True)
  return header, dropped


def _claim(out, header):
  """Marks a folder as the beginning of this set, or sees that it is."""
  for name in (DATASET, UNFINISHED):
    if (out / name).exists():
      old = _read_json(out / name)
      before, now = _flat(old), _flat(header)
      wrong = [key for key in now if before.get(key) != now[key]]
      if wrong:
        key = wrong[0]
        raise UsageError(
          f'{out} holds another prepared set, of {key} '
          f'{_short(before.get(key))!r} where this is {_short(now[key])!r}; '
          'choose another --out.'
        )
      return
  if out.exists() and any(out.iterdir()):
    raise UsageError(f'{out} is not empty; choose another --out.')
  out.mkdir(parents=True, exist_ok=True)
  _write_whole(out / UNFINISHED, json.dumps(header, indent=2) + '\n')


def _flat(header):
  """A header with the entries of its sections beside the others."""
  return {
    **header,
    'settings': None,
    'text': None,
    **header['settings'],
    **{f'text {k}': v for k, v in (header['text'] or {}).items()},
    'embeddings': header['text'] is not None,
  }


def _finished(file):
  """The record of a part that is written and whole, or None."""
  try:
    part = _read_json(file.with_suffix('.json'))
    return part if part['sha256'] == _sha256(file) else None
  except (DataError, OSError, KeyError):
    return None


def _write_part(file, source, indices, embed, progress):
  """Writes one part; the part's .json, which says it is whole, comes last."""
  temporary = file.with_suffix('.tmp')
  temporary.unlink(missing_ok=True)
  dropped, count = [], 0

  def attempt(i):
    try:
      return source.example(i)
    except (BadSample, OSError) as error:
      return error

  writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1')
  try:
    with concurrent.futures.ThreadPoolExecutor(
      min(16, os.cpu_count() or 1)
    ) as pool:
      for start in range(indices.start, indices.stop, BATCH):
        some = range(start, min(start + BATCH, indices.stop))
        good = []
        for i, example in zip(some, pool.map(attempt, some)):
          if isinstance(example, Exception):
            dropped.append((source.name(i), str(example)))
            source.note(*dropped[-1])
          else:
            good.append(example)
        captions = [example['caption'] for example in good]
        texts = embed(captions) if embed and good else [None] * len(good)
        for example, text in zip(good, texts):
          writer.write(_pack(example, text))
        count += len(good)
        if progress is not None:
          progress.add(len(some))
    writer.close()
    with temporary.open('rb+') as written:
      os.fsync(written.fileno())
    _verify(temporary, count)
  except RuntimeError as error:
    raise DataError(
      f'{file} could not be written ({error}); free space there and repeat '
      'the command.'
    ) from error
  temporary.replace(file)
  part = {
    'format_version': FORMAT_VERSION,
    'name': file.name,
    'count': count,
    'bytes': file.stat().st_size,
    'sha256': _sha256(file),
    'dropped': dropped,
  }
  _write_whole(file.with_suffix('.json'), json.dumps(part) + '\n')
  return part


def _verify(file, count):
  """The writer says nothing of a full disk, so the count is read back."""
  reader = array_record_module.ArrayRecordReader(str(file))
  found = reader.num_records() if count else 0
  reader.close()
  if found != count:
    raise DataError(
      f'{file} holds {found} of {count} records after writing; free space '
      'there and repeat the command.'
    )


def _pack(example, text):
  pixels = np.ascontiguousarray(example['image']).tobytes()
  header = {'caption': example['caption'], 'image': len(pixels)}
  head = json.dumps(header).encode()
  rows = b'' if text is None else np.ascontiguousarray(text).tobytes()
  return len(head).to_bytes(4, 'little') + head + pixels + rows


def _unpack(record):
  """(header, pixels, embeddings) of a record, as bytes-like views."""
  start = 4 + int.from_bytes(record[:4], 'little')
  header = json.loads(record[4:start])
  end = start + header['image']
  return header, memoryview(record)[start:end], memoryview(record)[end:]


def _padded(text, *, dim, max_len, **_):
  """{'text': [max_len, dim], 'mask': [max_len]} of ragged bytes."""
  rows = np.frombuffer(text, ml_dtypes.bfloat16).reshape(-1, dim)
  full = np.zeros((max_len, dim), ml_dtypes.bfloat16)
  full[: len(rows)] = rows
  return {'text': full, 'mask': np.arange(max_len) < len(rows)}


def _files(folder, header):
  """A set's files, as the reader wants them.

  Raises:
    DataError: one is missing or has another size.
  """
  for part in header['parts']:
    file = folder / part['name']
    if not file.exists() or file.stat().st_size != part['bytes']:
      raise DataError(
        f'{file} is missing or has another size than {DATASET} says; copy '
        'it again from where it came.'
      )
    if part['count']:
      yield f'{file}[0:{part["count"]}]'


def _read_header(path):
  if not (path / DATASET).exists():
    if (path / UNFINISHED).exists():
      raise DataError(
        f'{path} is not finished: repeat the imagen-prepare command that '
        'began it, and it continues.'
      )
    raise DataError(
      f'{path} is no prepared data: it has no {DATASET}; prepare one with '
      'imagen-prepare.'
    )
  header = _read_json(path / DATASET)
  try:
    _ = header['size'], header['count'], header['text'], header['parts']
  except KeyError as error:
    raise DataError(
      f'{path / DATASET} lacks {error}; copy it again from where it came.'
    ) from error
  return header


def _read_json(file):
  try:
    value = json.loads(file.read_text(encoding='utf-8'))
    version = value['format_version']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DataError(
      f'{file} cannot be read ({error}); copy it again from where it came.'
    ) from error
  if version != FORMAT_VERSION:
    raise DataError(
      f'{file} has format {version} and this version of imagen_jax reads '
      f'{FORMAT_VERSION}: upgrade, or prepare the data again.'
    )
  return value


def _write_whole(file, text):
  """A reader sees the old file or the new one, never half of one."""
  temporary = file.with_name(f'.{file.name}.tmp')
  with temporary.open('w', encoding='utf-8') as handle:
    handle.write(text)
    handle.flush()
    os.fsync(handle.fileno())
  temporary.replace(file)


def _sha256(file):
  with file.open('rb') as handle:
    return hashlib.file_digest(handle, 'sha256').hexdigest()


def _short(value):
  return value[:12] if isinstance(value, str) else value
