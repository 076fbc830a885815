"""Prepares a shard of a data set: one function, whoever calls it, how often.

`prepare_shard` reads one tar, or one range of samples, and writes one part.
What it writes depends on the shard and the spec only: not on the number of
workers, their order, or how often they were killed. A part's .json is written
last; it has the part's digest, by which a finished part is recognised.
"""

import base64
import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from imagen_jax.data.arrayrecord import DATASET, pack, unpack, write_records
from imagen_jax.data.checked import retried
from imagen_jax.data.claim import check_claim
from imagen_jax.data.report import thumbnail
from imagen_jax.data.shards import (
  FORMAT_VERSION,
  Shard,
  Spec,
  digest,
  opened,
)
from imagen_jax.data.source import Source
from imagen_jax.errors import DataError, ImagenError
from imagen_jax.io import bucket, files, ranges
from imagen_jax.io.decode import BadSample
from imagen_jax.io.files import AnyPath

BATCH = 64  # samples between two calls of `tell`
WORDS = (8, 16, 32, 64, 128)  # bounds of the counts of captions by length
THUMBNAILS, SHOWN = 2, 12  # of dropped images: by reason, and in all
DIGEST = 16  # bytes of the digest of an image

# Called with (samples done, samples) of the shard.
Tell = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a shard, small enough to send.

  Attributes:
    number, name: of the shard.
    count: images of its part; 0 if there is none.
    problem: why there is none, in a sentence.
  """

  number: int
  name: str
  count: int = 0
  problem: str | None = None


def attempt(
  shard: Shard,
  out: AnyPath,
  spec: Spec,
  *,
  threads: int = 1,
  tell: Tell | None = None,
) -> Outcome:
  """`prepare_shard`, with its errors as an outcome.

  The reason of a failure is written beside the parts as well, where `merge`
  finds it, and goes away with the next success.
  """
  file = bucket.at(out) / shard.file
  try:
    done = prepare_shard(shard, out, spec, threads=threads, tell=tell)
    return Outcome(shard.number, str(shard), done['count'])
  except Exception as error:
    problem = sentence(error)
    try:
      part = finished(file, shard, spec)
      if part:  # another worker's, whose merge has removed this one's file
        return Outcome(shard.number, str(shard), part['count'])
      _forget_old(file, shard)
      failure = {'format_version': FORMAT_VERSION, 'reason': problem}
      files.write_json(_failed(file), failure)
    except Exception as another:
      logging.getLogger(__name__).info('%s: %s', file, another)
    return Outcome(shard.number, str(shard), problem=problem)


def sentence(error: Exception) -> str:
  """An error, for a user who sees it among thousands of others."""
  if isinstance(error, ImagenError):
    return ' '.join(str(error).split())
  reason = files.storage_reason(error) or bucket.reason(error)
  if isinstance(error, OSError):
    where = f'{error.filename}: ' if error.filename else ''
    return f'{where}{error.strerror or reason or error}.'
  if isinstance(error, MemoryError):
    return 'memory ran out; use fewer --workers.'
  if reason is None:  # a bug, or an image that is unlike all others
    logging.getLogger(__name__).error('unexpected', exc_info=error)
  text = ' '.join(str(error).split())[:300]
  return f'{reason or type(error).__name__}: {text}'


def prepare_shard(
  shard: Shard,
  out: AnyPath,
  spec: Spec,
  *,
  threads: int = 1,
  tell: Tell | None = None,
) -> dict[str, Any]:
  """Writes the part of a shard, whole or not at all, unless it is there.

  Args:
    shard: a tar, or a range of samples.
    out: folder of the set, claimed by `claim.claim`; on a disk or in a bucket.
    spec: of the set.
    threads: that read and decode; the bytes do not depend on it.
    tell: called now and then.

  Returns:
    the report, as the part's .json has it: `count`, `bytes`, `sha256`, the
    `dropped` samples with reasons and how many of them are `bad`, `buckets`
    (runs of [height, width, number of records]), `words`
    (numbers of captions by length), digests of the images, thumbnails.

  Raises:
    UsageError: the folder is of another spec.
    DataError: the shard cannot be read, or the part not be written.
    OSError: the same, of the file system or the bucket.
  """
  folder = bucket.at(out)
  check_claim(folder, spec)
  file = folder / shard.file
  part = finished(file, shard, spec)
  if part is None:
    part = _write(file, shard, spec, threads, tell)
  failed = _failed(file)
  if failed.exists():
    failed.unlink()
  return part


def finished(
  file: pathlib.Path, shard: Shard, spec: Spec
) -> dict[str, Any] | None:
  """The report of a part that is complete, undamaged, and of this shard."""
  try:
    part = read_report(file)
    whole = is_whole(file, part, ranges.state(str(file))[0])
    same = part['shard'] == shard.identity
    same = same and part['spec'] == digest(spec.header())
  except (DataError, OSError, KeyError):
    return None
  return part if whole and same and not _changed(part, shard) else None


def is_whole(file: pathlib.Path, part: Mapping[str, Any], size: int) -> bool:
  """Whether a part is as its report states; in a bucket, whether its size is.

  An object is whole or not there, and to read all of them takes hours.

  Args:
    file: of the part.
    part: its report.
    size: of the file.
  """
  if part['bytes'] != size or bucket.is_bucket(str(file)):
    return part['bytes'] == size
  return part['sha256'] == files.digest(file)['sha256']


def _forget_old(file: pathlib.Path, shard: Shard) -> None:
  """Makes a part that is of another content of its tar one that is lost."""
  try:
    old = _changed(read_report(file), shard)
  except (DataError, KeyError):
    return
  if old:
    file.with_suffix('.json').unlink(missing_ok=True)


def _changed(part: dict[str, Any], shard: Shard) -> bool:
  """Whether a part's tar has another size now; one that is gone has not."""
  try:
    return _size(shard) != part['input']
  except OSError:
    return False


def _size(shard: Shard) -> int | None:
  return ranges.state(shard.path)[0] if shard.path else None


def read_report(file: pathlib.Path) -> dict[str, Any]:
  """The report of a part; raises DataError if there is none."""
  report = file.with_suffix('.json')
  return files.read_json(report, error=DataError, version=FORMAT_VERSION)


def read_failure(file: pathlib.Path) -> str | None:
  """Why a part could not be written, if somebody tried."""
  try:
    return str(files.read_json(_failed(file), error=DataError)['reason'])
  except (DataError, KeyError):
    return None


def _failed(file: pathlib.Path) -> pathlib.Path:
  return file.with_suffix('.failed.json')


def _write(
  file: pathlib.Path, shard: Shard, spec: Spec, threads: int, tell: Tell | None
) -> dict[str, Any]:
  """Writes one part; its .json, which marks it as complete, comes last."""
  # An earlier merge's names another part.
  (file.parent / DATASET).unlink(missing_ok=True)
  with opened(shard, spec) as (source, indices):
    size = _size(shard)
    work = _Part(source, indices, spec, tell or (lambda done, total: None))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      count, sizes = write_records(file, work.records(pool))
    first = not shard.path and shard.start == 0
    part = {
      'format_version': FORMAT_VERSION,
      'name': file.name,
      'shard': shard.identity,
      'spec': digest(spec.header()),
      'input': size,
      'count': count,
      **sizes,
      **work.report(bool(shard.path) or first, os.path.dirname(shard.name)),
    }
  files.write_lines(file.with_suffix('.json'), [part])
  return part


class _Part:
  """The records of a part, and what is said of them.

  Args:
    source: of the samples.
    indices: of them.
    spec: of the set.
    tell: see `prepare_shard`.
  """

  def __init__(
    self, source: Source, indices: range, spec: Spec, tell: Tell
  ) -> None:
    self._source, self._indices, self._tell = source, indices, tell
    self._pack = functools.partial(pack, encoding=spec.encoding)
    self._failed: list[tuple[str, str]] = []
    self._digests = bytearray()
    self._buckets: list[list[int]] = []  # runs of (height, width, number)
    self._words = [0] * (len(WORDS) + 1)

  def records(self, pool: concurrent.futures.Executor) -> Iterator[bytes]:
    """The records, in the order of the source."""
    for record in self._packed(pool):
      header, pixels = unpack(record)
      shape = tuple(header['shape'])
      if not self._buckets or self._buckets[-1][:2] != [*shape]:
        self._buckets.append([*shape, 0])
      self._buckets[-1][2] += 1
      found = hashlib.sha256(f'{shape} '.encode())
      found.update(pixels)
      self._digests += found.digest()[:DIGEST]
      for caption in header['captions']:
        self._words[bisect.bisect_left(WORDS, caption.count(' ') + 1)] += 1
      yield record

  def _packed(self, pool: concurrent.futures.Executor) -> Iterator[bytes]:
    """The records of the good samples, in order."""
    indices = self._indices
    for start in range(0, len(indices), BATCH):
      some = indices[start : start + BATCH]
      for i, record in zip(some, pool.map(self._record, some)):
        if isinstance(record, BadSample):
          self._failed.append((self._source.name(i), str(record)))
        else:
          yield record
      self._tell(start + len(some), len(indices))

  def _record(self, i: int) -> bytes | BadSample:
    try:
      example = retried(self._source.to_store, i)
    except BadSample as error:
      return error
    except OSError as error:  # not bad, and perhaps back in an hour
      raise DataError(
        f'{self._source.name(i)} cannot be read now '
        f'({error.strerror or error}); run the same command again.'
      ) from error
    return self._pack(example)

  def report(self, skipped: bool, folder: str) -> dict[str, Any]:
    """The entries of the part's .json.

    Args:
      skipped: whether what the source skips is of this part.
      folder: of the shard, which the source does not know.
    """
    source = self._source
    dropped, bad = [*self._failed], len(self._failed)
    more: dict[str, int] = {}
    if skipped:
      dropped = [*source.skipped, *dropped]
      bad += len(source.bad) + source.unlisted_bad
      more = {**source.unlisted, 'it is damaged': source.unlisted_bad}
    named = lambda rows: [
      (os.path.join(folder, name), *row) for name, *row in rows
    ]
    return {
      'buckets': self._buckets,
      'words': self._words,
      'bad': bad,
      'dropped': named(dropped),
      'unlisted': {reason: n for reason, n in more.items() if n},
      'thumbnails': named(_thumbnails(source, dropped)),
      'digests': base64.b64encode(self._digests).decode(),
    }


def _thumbnails(
  source: Source, dropped: Sequence[tuple[str, str]]
) -> list[tuple[str, str, str]]:
  """(name, reason, data) of some of the dropped images that can be shown."""
  tried = collections.Counter[str]()
  found: list[tuple[str, str, str]] = []
  for name, reason in dropped:
    tried[reason] += 1
    if tried[reason] <= THUMBNAILS and len(found) < SHOWN:
      data = thumbnail(source.skipped_image(name))
      found += [(name, reason, data)] if data else []
  return found
