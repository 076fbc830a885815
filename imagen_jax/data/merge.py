"""Joins the parts of a prepared set: the second pass, by one process.

It needs the output folder only. It checks every part, finds exact duplicates by
the images' digests in the parts' reports, and writes what makes it a set,
`dataset.json`, and the report.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

from imagen_jax.data import report
from imagen_jax.data.arrayrecord import DATASET, DUPLICATES
from imagen_jax.data.checked import EXAMPLES
from imagen_jax.data.claim import claimed_shards, read_claim
from imagen_jax.data.prepare import (
  WORDS,
  is_whole,
  read_failure,
  read_report,
)
from imagen_jax.data.progress import Progress
from imagen_jax.data.report import Thumbnail
from imagen_jax.data.shards import Shard, digest
from imagen_jax.errors import DataError
from imagen_jax.io import bucket, files
from imagen_jax.io.files import AnyPath

DROPPED = 'dropped.jsonl'
TIMING = 'timing-{}.json'  # what a command measured
# What dataset.json has of a part, and what else a part's report must have.
PART = ('name', 'count', 'bytes', 'sha256', 'buckets')
COUNTED = ('bad', 'dropped', 'unlisted', 'thumbnails', 'words', 'digests')
SHOWN, THUMBNAILS = 6, 48  # thumbnails of the page: of a reason, and in all
TURN = 256  # parts read at a time
WAITING = 64  # requests to a bucket at a time
BINS = 64  # files of digests, each sorted in memory
KEY = np.dtype(
  [('head', '<u8'), ('tail', '<u8'), ('part', '<u4'), ('row', '<u4')]
)


def merge(
  out: AnyPath, *, max_bad: float, remove_duplicates: bool = False
) -> dict[str, Any]:
  """Makes a set of the parts in a folder; a second call writes the same bytes.

  Args:
    out: the folder, on a disk or in a bucket.
    max_bad: fraction of the samples that may be bad or in lost shards.
    remove_duplicates: leave out an image that is, in every pixel, one before
      it. The records stay in the parts, and the set lists those to skip.

  Returns:
    the report, also written as report.json.

  Raises:
    DataError: too much is lost; the report is written, and dataset.json not.
  """
  folder = bucket.at(out, key='out')
  spec = read_claim(folder)
  shards, sizes = claimed_shards(folder, spec), files.tree(out)
  totals, parts = _Totals(), list[dict[str, Any]]()
  with _Digests() as digests, files.replacing(folder / DROPPED) as temporary:
    with temporary.open('w', encoding='utf-8') as dropped:
      for shard, part in _read_all(folder, spec, shards, sizes):
        if isinstance(part, str):
          totals.lost.append((str(shard), part))
        else:
          digests.add(part, len(parts))
          totals.add(part, dropped)
          parts.append({key: part[key] for key in PART})
    again = digests.again()
  removed = again if remove_duplicates else again[:0]
  for number, count in zip(*np.unique(removed['part'], return_counts=True)):
    parts[number]['removed'] = int(count)
  found = {
    **{key: spec[key] for key in ('size', 'encode', 'quality', 'settings')},
    'shards': len(shards),
    **totals.report(duplicates=len(again), removed=len(removed)),
    'timing': _timing(folder, sizes),
  }
  files.write_json(folder / report.JSON, found)
  files.write_text(folder / report.HTML, report.page(found, totals.thumbnails))
  try:
    totals.check(folder, len(shards), max_bad)
  except DataError:
    # An earlier merge's, of parts that may be others by now.
    (folder / DATASET).unlink(missing_ok=True)
    raise
  rows = removed['row'].astype('<u4').tobytes()
  if rows:
    files.write_bytes(folder / DUPLICATES, rows)
  header = {**spec, 'count': found['kept'], 'parts': parts}
  files.write_json(folder / DATASET, header)
  _tidy(folder, sizes, keep_duplicates=bool(rows))
  return found


def _tidy(
  folder: pathlib.Path, sizes: Mapping[str, int], keep_duplicates: bool
) -> None:
  """Removes what killed workers and an earlier merge have left."""
  if DUPLICATES in sizes and not keep_duplicates:
    (folder / DUPLICATES).unlink()
  for name in sizes:
    if fnmatch.fnmatchcase(name, '.*.tmp'):
      (folder / name).unlink(missing_ok=True)


def _read_all(
  folder: pathlib.Path,
  spec: Mapping[str, Any],
  shards: Sequence[Shard],
  sizes: Mapping[str, int],
) -> Iterator[tuple[Shard, dict[str, Any] | str]]:
  """(shard, the report of its part, or why it has none), in order."""
  of = digest(spec)
  progress = Progress(f'{folder}: parts checked', len(shards))
  threads = WAITING if bucket.is_bucket(str(folder)) else os.cpu_count()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(shards), TURN):  # a report can be a megabyte
      some = shards[start : start + TURN]
      for shard, part in zip(
        some, pool.map(lambda shard: _read(folder, of, shard, sizes), some)
      ):
        yield shard, part
        progress.add()
  progress.close()


def _read(
  folder: pathlib.Path, of: str, shard: Shard, sizes: Mapping[str, int]
) -> dict[str, Any] | str:
  file = folder / shard.file
  if not {file.name, file.with_suffix('.json').name} <= sizes.keys():
    return read_failure(file) or 'it has not been prepared.'
  try:
    part = read_report(file)
    if part['spec'] != of or part['shard'] != shard.identity:
      return f'{file} was written by another spec; remove it.'
    whole = is_whole(file, part, sizes[file.name])
    _ = [part[key] for key in (*PART, *COUNTED)]
    return part if whole else f'{file} is damaged; prepare it again.'
  except (DataError, OSError) as error:
    return str(error)
  except KeyError as error:
    return f'{file.with_suffix(".json")} lacks {error}; remove it.'


@dataclasses.dataclass
class _Totals:
  """Sums over the parts, for the report."""

  kept: int = 0
  bytes: int = 0
  bad: int = 0
  words: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(len(WORDS) + 1, np.int64)
  )
  dropped: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  thumbnails: list[Thumbnail] = dataclasses.field(default_factory=list)
  lost: list[tuple[str, str]] = dataclasses.field(default_factory=list)

  def add(self, part: Mapping[str, Any], listing: IO[str]) -> None:
    """Counts a part, and lists what it has dropped."""
    self.kept += part['count']
    self.bytes += part['bytes']
    self.bad += part['bad']
    self.words += part['words']
    for name, reason in part['dropped']:
      listing.write(json.dumps({'name': name, 'reason': reason}) + '\n')
      entry = self._entry(reason)
      entry['number'] += 1
      if len(entry['examples']) < EXAMPLES:
        entry['examples'].append(name)
    for reason, number in part['unlisted'].items():
      self._entry(reason)['number'] += number
    for thumbnail in part['thumbnails']:
      entry = self._entry(thumbnail[1])
      if entry['shown'] < SHOWN and len(self.thumbnails) < THUMBNAILS:
        entry['shown'] += 1
        self.thumbnails.append(thumbnail)

  def _entry(self, reason: str) -> dict[str, Any]:
    empty = {'number': 0, 'examples': [], 'shown': 0}
    return self.dropped.setdefault(reason, empty)

  def report(self, *, duplicates: int, removed: int) -> dict[str, Any]:
    """The entries of report.json."""
    labels = [f'at most {n} words' for n in WORDS] + ['more words']
    return {
      'kept': self.kept - removed,
      'bytes': self.bytes,
      'bad': self.bad,
      'dropped': self.dropped,
      'duplicates': {'found': duplicates, 'removed': removed},
      'captions': dict(zip(labels, self.words.tolist())),
      'lost': [{'shard': s, 'reason': reason} for s, reason in self.lost],
    }

  def check(self, folder: pathlib.Path, shards: int, max_bad: float) -> None:
    """Raises DataError if too much is lost.

    A lost shard counts as its share of the shards, since nobody knows how many
    samples it has.
    """
    total = self.kept + sum(d['number'] for d in self.dropped.values())
    whole = 1 - len(self.lost) / shards
    lost = 1 - whole * (1 - self.bad / max(total, 1))
    if lost <= max_bad and self.kept:
      return
    said = [f'{shard}: {reason}' for shard, reason in self.lost[:EXAMPLES]]
    said += [f'{self.bad} of {total} samples are bad'] * bool(self.bad)
    raise DataError(
      f'{folder}: {lost:.2%} of the data are lost, where max_bad allows '
      f'{max_bad:.2%}, and {self.kept} images are left. {len(self.lost)} of '
      f'{shards} shards could not be prepared. {" ".join(said)} See '
      f'{folder / report.HTML}, then run the same command again, or raise '
      'max_bad.'
    )


class _Digests:
  """The digests of all images, in files of a size that is sorted in memory.

  400 million images take 9.6 GB of temporary disk space.
  """

  def __enter__(self) -> '_Digests':
    self._stack = contextlib.ExitStack()
    make = tempfile.TemporaryFile
    self._files = [self._stack.enter_context(make()) for _ in range(BINS)]
    return self

  def __exit__(self, *error: object) -> None:
    self._stack.close()

  def add(self, part: Mapping[str, Any], number: int) -> None:
    """Adds the images of a part."""
    data = np.frombuffer(base64.b64decode(part['digests']), '<u8')
    found = np.zeros(len(data) // 2, KEY)
    found['head'], found['tail'] = data.reshape(-1, 2).T
    found['part'], found['row'] = number, np.arange(len(found))
    which = found['head'] % BINS
    for k in np.unique(which):
      self._files[int(k)].write(found[which == k].tobytes())

  def again(self) -> np.ndarray:
    """[n] of type `KEY`: images that are one before them, in order."""
    again = []
    for file in self._files:
      file.seek(0)
      found = np.frombuffer(file.read(), KEY)
      found = _sorted(found, 'head', 'tail', 'part', 'row')
      same = [found[key][1:] == found[key][:-1] for key in ('head', 'tail')]
      again.append(found[1:][same[0] & same[1]])
    return _sorted(np.concatenate(again), 'part', 'row')


def _sorted(found: np.ndarray, *keys: str) -> np.ndarray:
  return found[np.lexsort([found[key] for key in reversed(keys)])]


def _timing(folder: pathlib.Path, sizes: Mapping[str, int]) -> dict[str, float]:
  """Sums of what the workers' commands measured."""
  names = fnmatch.filter(sizes, TIMING.format('*'))
  found = [files.read_json(folder / name, error=DataError) for name in names]
  images = sum(each['images'] for each in found)
  seconds = sum(each['seconds'] * each['processes'] for each in found)
  if not seconds:
    return {}
  return {
    'images': images,
    'process_seconds': round(seconds, 3),
    'images_per_process_second': round(images / seconds, 2),
  }
