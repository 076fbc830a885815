"""Writes any source as prepared data, which `arrayrecord` reads.

A set is written in parts. A part's .json is written last and marks it as
complete, so the same call resumes an interrupted one.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.data.arrayrecord import (
  DATASET,
  FORMAT_VERSION,
  UNFINISHED,
  pack,
  short,
  write_records,
)
from imagen_jax.data.checked import (
  CLEANING,
  retried,
  thread_pool,
  write_skipped,
)
from imagen_jax.data.encoding import BYTES, RAW, Encoding
from imagen_jax.data.progress import Progress
from imagen_jax.data.source import Source
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import files, lock
from imagen_jax.io.decode import RESIZING, BadSample
from imagen_jax.io.files import AnyPath

DROPPED = 'dropped.jsonl'
BATCH = 64  # samples read, and captions embedded, at a time
PART = 256e6  # bytes of a part, if its size is not given
TOKENS = 20  # of a caption, for that

Embed = Callable[[Sequence[str]], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The settings of a prepared set; other settings make another set.

  Attributes:
    size: side of the images in pixels.
    settings: JSON-ready dict of all else that the set depends on.
    text: the header's entry on the embeddings; None for none.
    number: of samples to write, from the first; None writes all.
    part_size: samples per part; 0: as many as take about `PART` bytes.
    encoding: of the images.
  """

  size: int
  settings: Mapping[str, Any]
  text: Mapping[str, Any] | None = None
  number: int | None = None
  part_size: int = 0
  encoding: Encoding = RAW

  def __post_init__(self) -> None:
    if not self.part_size:
      each = BYTES[self.encoding.kind] * self.size**2 + 200
      if self.text is not None:
        each += 2 * TOKENS * self.text['dim']
      size = max(BATCH, int(PART / each) // BATCH * BATCH)
      object.__setattr__(self, 'part_size', size)

  def header(self, number: int) -> dict[str, Any]:
    """The first entries of `dataset.json`, for `number` samples."""
    return {
      'format_version': FORMAT_VERSION,
      'size': self.size,
      'encode': self.encoding.kind,
      'quality': self.encoding.quality,
      'cleaning': CLEANING,
      'resizing': RESIZING,
      'text': self.text,
      'of': number,
      'part_size': self.part_size,
      'settings': self.settings,
    }


def prepare(
  source: Source,
  out: AnyPath,
  recipe: Recipe,
  *,
  embed: Embed | None = None,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
  """Writes a source as prepared data, or resumes an interrupted call.

  Args:
    source: of examples at `recipe.size`.
    out: folder, new or with an unfinished copy of the same set.
    recipe: the settings of the set.
    embed: list of captions -> list of bfloat16 [tokens, dim], if the recipe
      has text.

  Returns:
    (the header, [(name, reason)] of the skipped samples).

  Raises:
    UsageError: `out` holds something else, or another process writes there.
    DataError: a part could not be written, or too many samples are bad.
  """
  out = pathlib.Path(out)
  with lock.locked(out, key='out'):
    return _prepare(source, out, recipe, embed)


def _prepare(
  source: Source, out: pathlib.Path, recipe: Recipe, embed: Embed | None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
  """`prepare`, in a folder that no other process writes to."""
  size = recipe.part_size
  number = min(recipe.number or len(source), len(source))
  header = recipe.header(number)
  _claim(out, header)
  progress = Progress(f'{out}:', number)
  parts: list[dict[str, Any]] = []
  for start in range(0, number, size):
    indices = range(start, min(start + size, number))
    file = out / f'part-{len(parts):05d}.array_record'
    part = _finished(file)
    if part is None:
      work = _Part(source, indices, recipe.encoding, embed)
      part = _write_part(file, work, progress)
    else:
      progress.add(len(indices))
    parts.append(part)
  progress.close()
  dropped = [*source.skipped]
  dropped += [entry for part in parts for entry in part.pop('dropped')]
  write_skipped(out / DROPPED, dropped)
  header |= {'count': sum(part['count'] for part in parts), 'parts': parts}
  files.write_json(out / DATASET, header)
  (out / UNFINISHED).unlink(missing_ok=True)
  return header, dropped


def _claim(out: pathlib.Path, header: Mapping[str, Any]) -> None:
  """Marks a new folder as this set, or checks that an old one is."""
  for name in (DATASET, UNFINISHED):
    if (out / name).exists():
      old = files.read_json(out / name, error=DataError, version=FORMAT_VERSION)
      before, now = _flat(old), _flat(header)
      wrong = [key for key in now if before.get(key) != now[key]]
      if wrong:
        key = wrong[0]
        raise UsageError(
          f'{out} holds a set prepared with {key} {short(before.get(key))!r}, '
          f'and this call has {short(now[key])!r}; choose another folder.',
          key='out',
        )
      for cut in out.glob('.part-*.tmp'):  # left by a killed process
        cut.unlink()
      return
  if {path.name for path in out.iterdir()} - {lock.FILE}:
    raise UsageError(f'{out} is not empty; choose another folder.', key='out')
  files.write_json(out / UNFINISHED, header)


def _flat(header: Mapping[str, Any]) -> dict[str, Any]:
  """A header with its sections flattened."""
  return {
    **header,
    'settings': None,
    'text': None,
    **header['settings'],
    **{f'text {k}': v for k, v in (header['text'] or {}).items()},
    'embeddings': header['text'] is not None,
  }


def _finished(file: pathlib.Path) -> dict[str, Any] | None:
  """The .json of a complete, undamaged part, or None."""
  try:
    part = files.read_json(
      file.with_suffix('.json'), error=DataError, version=FORMAT_VERSION
    )
    return part if part['sha256'] == files.digest(file)['sha256'] else None
  except (DataError, OSError, KeyError):
    return None


@dataclasses.dataclass(frozen=True)
class _Part:
  """What a part is made of."""

  source: Source
  indices: range
  encoding: Encoding
  embed: Embed | None


def _write_part(
  file: pathlib.Path, work: _Part, progress: Progress
) -> dict[str, Any]:
  """Writes one part; its .json, which marks it as complete, comes last."""
  source, indices, embed = work.source, work.indices, work.embed
  pack_one = functools.partial(pack, encoding=work.encoding)
  dropped: list[tuple[str, str]] = []
  shapes = collections.Counter[tuple[int, ...]]()

  def attempt(i: int) -> dict[str, Any] | Exception:
    try:
      return retried(source.example, i)
    except (BadSample, OSError) as error:
      return error

  def records(pool: concurrent.futures.Executor) -> Iterator[bytes]:
    for start in range(indices.start, indices.stop, BATCH):
      some = range(start, min(start + BATCH, indices.stop))
      good = []
      for i, example in zip(some, pool.map(attempt, some)):
        if isinstance(example, Exception):
          dropped.append((source.name(i), str(example)))
          source.note(*dropped[-1])
        else:
          good.append(example)
      shapes.update(example['image'].shape[:2] for example in good)
      captions = [example['caption'] for example in good]
      texts = embed(captions) if embed and good else [None] * len(good)
      yield from pool.map(pack_one, good, texts)
      progress.add(len(some))

  with thread_pool() as pool:
    count = write_records(file, records(pool))
  part = {
    'format_version': FORMAT_VERSION,
    'name': file.name,
    'count': count,
    **files.digest(file),
    'shapes': [[*shape, number] for shape, number in shapes.items()],
    'dropped': dropped,
  }
  files.write_lines(file.with_suffix('.json'), [part])
  return part
