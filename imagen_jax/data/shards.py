"""What a prepared set is made of: its spec, and the shards to prepare."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from imagen_jax.data import checked, progress, where
from imagen_jax.data.checked import CLEANING, NoImage
from imagen_jax.data.encoding import BYTES, RAW, Encoding
from imagen_jax.data.source import Source
from imagen_jax.data.sources import IGNORABLE, source_options
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import aspect
from imagen_jax.io.decode import RESIZING

FORMAT_VERSION = 3
PART = 64e6  # bytes of a part, if its size is not given
LEAST = 64  # samples of a part, for that


@dataclasses.dataclass(frozen=True)
class Spec:
  """The settings of a prepared set; other settings make another set.

  Attributes:
    source: `kind`, `path` and the other arguments of `make_source`.
    size: side of the images in pixels.
    encoding: of the images.
    number: of samples to prepare, from the first, of a source that is prepared
      by ranges; None: all.
    part_size: samples of a range; 0: as many as take about `PART` bytes.
    fingerprint: of such a source; set by `plan`.
  """

  source: Mapping[str, Any]
  size: int
  encoding: Encoding = RAW
  number: int | None = None
  part_size: int = 0
  fingerprint: str | None = None

  def header(self) -> dict[str, Any]:
    """All that the bytes of the set depend on, JSON-ready."""
    apart = ('kind', 'path', 'index')  # data may move
    settings = {
      key: list(value) if isinstance(value, tuple) else value
      for key, value in self.source.items()
      if key not in apart and value not in IGNORABLE.get(key, (None,))
    }
    settings |= {'source': self.source['kind'], 'fingerprint': self.fingerprint}
    return {
      'format_version': FORMAT_VERSION,
      'size': self.size,
      'encode': self.encoding.kind,
      'quality': self.encoding.quality,
      'cleaning': CLEANING,
      'resizing': RESIZING,
      'of': self.number,
      'part_size': self.part_size,
      'settings': settings,
    }


@dataclasses.dataclass(frozen=True)
class Shard:
  """What becomes one part of a prepared set: a tar, or a range of samples.

  Attributes:
    number: of the part.
    path: of the tar; None: a range.
    name: of the tar, below the folder of all.
    start, stop: the range.
  """

  number: int
  path: str | None = None
  name: str = ''
  start: int = 0
  stop: int = 0

  @property
  def file(self) -> str:
    """The name of the part."""
    return f'part-{self.number:05d}.array_record'

  @property
  def identity(self) -> str | list[int]:
    """What the part is made from, JSON-ready."""
    return self.name if self.path else [self.start, self.stop]

  def __str__(self) -> str:
    return self.path or f'samples {self.start} to {self.stop - 1}'


def digest(header: Mapping[str, Any]) -> str:
  """sha256 of a spec's header, with or without the name of its shards."""
  some = {k: v for k, v in header.items() if k != 'shards'}
  return hashlib.sha256(json.dumps(some, sort_keys=True).encode()).hexdigest()


def plan(spec: Spec, *, max_bad: float) -> tuple[Spec, list[Shard]]:
  """The shards of a spec, and the spec with what is known only now.

  Args:
    spec: of the set.
    max_bad: fraction of bad samples that a source prepared by ranges may have.

  Raises:
    UsageError: the spec does not fit the source.
    DataError: there are no usable data, or too many are bad.
  """
  options: dict[str, Any] = {**spec.source, 'size': spec.size}
  cls, given = _options(options, max_bad)
  if cls.endless and spec.number is None:
    raise UsageError(
      f'is needed, because source {options["kind"]} is endless.', key='num'
    )
  # Before the first of thousands of shards finds out.
  aspect.shapes(spec.size, options.get('aspect') or 'crop')
  where.parse(options.get('where'))
  tars = cls.find_shards(given['path']) if 'path' in given else None
  if tars is not None:
    _check_split(options, cls.has_eval_split)
    for key, value in (('num', spec.number), ('part_size', spec.part_size)):
      if value:
        raise UsageError(
          'has no effect on tars, each of which becomes one part; give the '
          'path of fewer tars.',
          key=key,
        )
    names = enumerate(tars.items())
    found = [Shard(i, tar, name) for i, (name, tar) in names]
    cls.check_shard(**given | {'path': found[0].path})
    return spec, found
  source = cls(**given)
  _check_split(options, source.has_eval_split)
  number = min(spec.number or len(source), len(source))
  size = spec.part_size
  if not size:
    each = BYTES[spec.encoding.kind] * spec.size**2 + 200
    size = max(LEAST, int(PART / each) // LEAST * LEAST)
  spec = dataclasses.replace(
    spec, number=number, part_size=size, fingerprint=source.fingerprint
  )
  return spec, ranges_of(number, size)


def _check_split(options: Mapping[str, Any], held_out: bool) -> None:
  """Refuses the eval split of a source that would give the same images."""
  if options.get('split') == 'eval' and not held_out:
    raise UsageError(
      f'source {options["kind"]} has no images of its own for eval; give the '
      'path of held-out ones.',
      key='split',
    )


def ranges_of(number: int, size: int) -> list[Shard]:
  """The shards of that many samples, `size` samples each."""
  starts = enumerate(range(0, number, size))
  return [
    Shard(i, start=start, stop=min(start + size, number)) for i, start in starts
  ]


@contextlib.contextmanager
def opened(shard: Shard, spec: Spec) -> Iterator[tuple[Source, range]]:
  """(a source, the numbers of the shard's samples in it).

  All samples of a tar may be bad; the range is empty then.

  Raises:
    DataError: the tar has vanished or is damaged, or the data have changed.
  """
  with _quietly():
    if shard.path is None:
      source = _source(json.dumps({**spec.source, 'size': spec.size}))
      if source.fingerprint != spec.fingerprint:
        raise DataError(
          'the data have changed since the set was begun; choose another folder'
          ' for the new ones.'
        )
      yield source, range(shard.start, shard.stop)
      return
    cls, given = _options({**spec.source, 'size': spec.size}, 1.0)
    given['path'] = shard.path
    with contextlib.ExitStack() as stack:
      try:
        source = stack.enter_context(cls.open_shard(**given))
        number = len(source)
      except NoImage as error:
        source, number = error.source, 0
      except FileNotFoundError as error:
        raise DataError(f'{shard.path} has vanished; put it back.') from error
      yield source, range(number)


@functools.lru_cache(maxsize=1)
def _source(options: str) -> Source:
  """The source of a worker, opened once for all its ranges."""
  cls, given = _options(json.loads(options), 1.0)
  return cls(**given)


def _options(
  options: dict[str, Any], max_bad: float
) -> tuple[type[Source], dict[str, Any]]:
  """`source_options`, with the fraction of bad samples if the class has it."""
  cls, given = source_options(**{'max_bad': checked.MAX_BAD} | options)
  return cls, given | ({'max_bad': max_bad} if 'max_bad' in given else {})


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
  """Without the warnings and the progress of each of thousands of tars."""
  log = logging.getLogger(checked.__name__)
  level = log.level
  log.setLevel(logging.ERROR)
  try:
    with progress.silenced():
      yield
  finally:
    log.setLevel(level)


def short(value: Any) -> Any:
  """The first 12 characters of a string; anything else unchanged."""
  return value[:12] if isinstance(value, str) else value
