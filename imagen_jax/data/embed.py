"""Embeds the captions of a prepared set, part by part.

Any number of hosts take parts and do not talk to each other. A part is written
whole or not at all; its .json comes last and marks it as finished. Whoever
finds all parts finished writes the header, so the same command resumes an
interrupted one, and completes what others did.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

from imagen_jax.data.arrayrecord import read_set, unpack, write_records
from imagen_jax.data.checked import retried, thread_pool
from imagen_jax.data.embeddings import FORMAT_VERSION, HEADER, IDENTITY
from imagen_jax.data.progress import Progress
from imagen_jax.data.records import Part, Records
from imagen_jax.data.shards import short
from imagen_jax.errors import DataError, NumericError, UsageError
from imagen_jax.io import bucket, embeddings, files
from imagen_jax.io.decode import BadSample
from imagen_jax.io.files import AnyPath

MEMORY = 2e9  # bytes of embeddings that wait to be written
TOKENS = 24  # of a caption, for that
LEAST = 64  # images that are read at a time
SHOWN = 3  # failed parts, or files, that a message names
# The files in a folder of embeddings, also of calls that were killed.
OURS = re.compile(rf'part-\d+\.(array_record|json)|{re.escape(HEADER)}|\..*')

Item = TypeVar('Item')
Tokens: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """What embeds captions.

  Attributes:
    identity: see `embeddings.IDENTITY`.
    tokenize: captions -> (ids, mask, tokens cut off), called in a thread.
    encode: (ids, mask) -> (index, float32 [tokens, dim]) of each, in any order.
  """

  identity: Mapping[str, Any]
  tokenize: Callable[[Sequence[str]], Tokens]
  encode: Callable[[np.ndarray, np.ndarray], Iterator[tuple[int, np.ndarray]]]


class _Unreadable(DataError):
  """The captions of a part cannot be read; the others may be."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """Some of a part's images, or why the rest of it cannot be read.

  Attributes:
    part: of the images.
    counts: captions of each.
    tokens: of all captions.
    problem: a sentence.
  """

  part: Part
  counts: Sequence[int] = ()
  tokens: Tokens | None = None
  problem: str | None = None


def embed(
  path: AnyPath,
  out: AnyPath,
  encoder: Encoder,
  *,
  shard: tuple[int, int] = (0, 1),
) -> dict[str, Any] | None:
  """Writes the embeddings of a prepared set, or of every n-th of its parts.

  Args:
    path: folder of the set.
    out: folder of the embeddings, on a disk or in a bucket.
    encoder: what embeds.
    shard: (i, n): takes parts i, i + n, …

  Returns:
    the header, or None if parts are left to others.

  Raises:
    UsageError: `out` has embeddings of another encoder or of other images.
    DataError: the set is unusable; or parts of it are, after all others have
      been embedded.
    NumericError: an embedding is NaN or Inf.
  """
  folder = bucket.at(out)
  images, parts, missing = read_set(bucket.at(path))
  of = {entry['name']: entry['sha256'] for entry in images['parts']}
  names = [os.path.basename(part.path) for part in parts]
  files.make_folder(folder)
  there, mine = files.tree(folder), []
  others = [name for name in there if not OURS.fullmatch(name)]
  if others:
    raise UsageError(
      f'{out} holds other files ({", ".join(sorted(others)[:SHOWN])}); choose '
      'an empty folder.',
      key='out',
    )
  for part, name in list(zip(parts, names))[shard[0] :: shard[1]]:
    if _finished(folder / name, there, of[name], encoder.identity) is None:
      mine.append(part)
  progress = Progress(f'{out}:', sum(part.count for part in mine))
  problems: dict[str, str] = {}
  with thread_pool() as pool:
    chunks = _ahead(_chunks(mine, missing, encoder, pool))
    for part, some in itertools.groupby(chunks, key=lambda chunk: chunk.part):
      name = os.path.basename(part.path)
      try:
        _write(folder / name, of[name], encoder, some, progress)
      except _Unreadable as error:
        problems[name] = str(error)
        _log.warning('%s is left out: %s', name, error)
  progress.close()
  if problems:
    shown = '; '.join(f'{n}: {p}' for n, p in [*problems.items()][:SHOWN])
    raise DataError(
      f'{len(problems)} of {len(mine)} parts of {path} could not be embedded, '
      f'and all others are: {shown}; mend them, then run the same command '
      'again.'
    )
  return _finish(folder, {name: of[name] for name in names}, encoder.identity)


def _chunks(
  parts: Iterable[Part],
  missing: Mapping[str, DataError],
  encoder: Encoder,
  pool: concurrent.futures.Executor,
) -> Iterator[_Chunk]:
  """The captions of all parts, as many at a time as fit in memory."""
  identity = encoder.identity
  each = embeddings.BYTES[identity['store']] * TOKENS * identity['dim']
  size = max(LEAST, int(MEMORY / each))
  for part in parts:
    # Of the whole file: duplicates that the set leaves out keep their place.
    records = Records([Part(part.path, part.bytes, part.count)])
    read = functools.partial(_captions, records)
    try:
      if part.path in missing:
        raise missing[part.path]
      for start in range(0, part.count, size):
        some = range(start, min(start + size, part.count))
        texts = [*pool.map(read, some)]
        flat = [text for several in texts for text in several]
        yield _Chunk(part, [*map(len, texts)], encoder.tokenize(flat))
    except (DataError, OSError) as error:
      yield _Chunk(part, problem=str(error))


def _captions(records: Records, i: int) -> Sequence[str]:
  """The captions of a record; of a damaged one, none.

  Training takes its neighbour instead, so it needs no embedding.
  """
  try:
    return unpack(retried(records.__getitem__, i))[0]['captions']
  except (BadSample, ValueError, LookupError):
    return ()


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
  """The items, each computed in a thread while the one before is used."""
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    coming = thread.submit(next, items, None)
    while (item := coming.result()) is not None:
      coming = thread.submit(next, items, None)
      yield item


def _write(
  file: pathlib.Path,
  of: str,
  encoder: Encoder,
  chunks: Iterable[_Chunk],
  progress: Progress,
) -> None:
  """Writes the embeddings of a part; its .json, which marks it, comes last."""
  numbers = {'captions': 0, 'tokens': 0, 'cut': 0, 'damaged': 0}

  def records() -> Iterator[bytes]:
    for chunk in chunks:
      if chunk.tokens is None:
        raise _Unreadable(str(chunk.problem))
      ids, mask, cut = chunk.tokens
      packed: list[tuple[int, bytes]] = [(0, b'')] * len(ids)
      for i, rows in encoder.encode(ids, mask):
        tokens = rows[: mask[i].sum()]
        if not np.isfinite(tokens).all():
          raise NumericError(
            f'the text encoder gives NaN or Inf for caption {i} of the '
            f'{len(ids)} read from {chunk.part.path}; check its weights, or '
            'embed with --dtype float32 if it was bfloat16.'
          )
        packed[i] = embeddings.pack_caption(tokens, encoder.identity['store'])
      numbers['captions'] += len(ids)
      numbers['tokens'] += int(mask.sum())
      numbers['cut'] += int((cut > 0).sum())
      numbers['damaged'] += [*chunk.counts].count(0)
      start = 0
      for count in chunk.counts:
        yield embeddings.pack(packed[start : start + count])
        start += count
      progress.add(len(chunk.counts))

  count, written = write_records(file, records())
  part = {
    'format_version': FORMAT_VERSION,
    'name': file.name,
    'count': count,
    **written,
    'of': of,
    **numbers,
    'identity': dict(encoder.identity),
  }
  files.write_lines(file.with_suffix('.json'), [part])


def _finished(
  file: pathlib.Path,
  there: Mapping[str, int],
  of: str,
  identity: Mapping[str, Any],
) -> dict[str, Any] | None:
  """The report of a finished part, or None.

  Args:
    file: of the part.
    there: {name: bytes} of the files of its folder.
    of: digest of the images' part.
    identity: of the encoder.

  Raises:
    UsageError: it is of other embeddings.
  """
  report = file.with_suffix('.json')
  if not (report.name in there and file.name in there):
    return None
  try:
    part = files.read_json(report, error=DataError, version=FORMAT_VERSION)
    have = {**part['identity'], 'of': part['of']}
    if part['bytes'] != there[file.name]:
      return None  # damaged: made again
  except (DataError, KeyError, TypeError):
    return None
  for key, value in {**identity, 'of': of}.items():
    if have.get(key) != value:
      name = IDENTITY[key][0] if key in IDENTITY else 'set of images'
      raise UsageError(
        f'{file.parent} holds embeddings of another {name} '
        f'({short(have.get(key))}) than this call has ({short(value)}); choose '
        'another folder.',
        key='out',
      )
  return part


def _finish(
  folder: pathlib.Path, of: Mapping[str, str], identity: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Writes the header if all parts are finished."""
  found, there = [], files.tree(folder)
  for name in of:
    part = _finished(folder / name, there, of[name], identity)
    if part is None:
      return None
    del part['identity'], part['format_version']
    found.append(part)
  totals = {
    key: sum(part[key] for part in found)
    for key in ('captions', 'tokens', 'cut', 'damaged', 'bytes')
  }
  header = {'format_version': FORMAT_VERSION, **identity, **totals}
  header['parts'] = found
  text = json.dumps(header, indent=2) + '\n'
  file = folder / HEADER
  if HEADER not in there or file.read_text() != text:
    files.write_text(file, text)
  return header
