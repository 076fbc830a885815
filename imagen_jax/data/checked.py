"""Bad samples are found once, skipped and listed.

A source checks every sample when it is first opened: the image must decode,
the caption must be text. The result is cached in the user's cache directory,
so later starts read no image. Bad samples are skipped before shuffling, so the
order of the rest is the same on every host and at every start.
"""

import collections
import concurrent.futures
import errno
import functools
import logging
import os
import pathlib
import re
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from imagen_jax.data import where as conditions
from imagen_jax.data.progress import Progress
from imagen_jax.data.source import Source
from imagen_jax.errors import DataError
from imagen_jax.io import aspect as aspects
from imagen_jax.io import files
from imagen_jax.io.decode import BadSample, decode, fitted
from imagen_jax.io.files import AnyPath

Key = TypeVar('Key')
Found = TypeVar('Found')

MAX_BAD = 0.01  # fraction of bad samples that a source tolerates
MAX_CAPTION = 10_000  # characters; longer is a document, not a caption
# Version of `clean_caption`, recorded with stored embeddings.
CLEANING = 'whitespace-1'
LISTED = 10_000  # samples left out that a source keeps a list of
TURN = 256  # samples checked between two updates of the progress
EXAMPLES = 3  # names that a message lists per reason
SUBSTITUTES = 100  # neighbours tried before giving up
PAUSES = (0.1, 1, 4, 10)  # seconds before a failed read is repeated
# What is said of a sample that could not be read this time.
UNREADABLE = 'it cannot be read now'
_SURROGATE = re.compile('[\ud800-\udfff]')
# Errors of the file system that no repetition heals.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)


class NoImage(DataError):
  """All samples of a source are skipped.

  Attributes:
    source: with the reasons in `skipped`.
  """

  def __init__(self, message: str, source: Source) -> None:
    super().__init__(message)
    self.source = source


class Checked(Source):
  """Random access to the samples that passed the check, {'image', 'caption'}.

  A sample that fails later, because its file has changed or the disk fails time
  after time, is replaced by the next good one and counts as bad. It is tried
  again whenever its turn comes.

  Subclasses have `scan`, `__len__`, `name`, and `read` or `example`.

  Args:
    path: of the data, see the subclass.
    size: side of the images in pixels.
    resize: see `decode`.
    max_bad: fraction of bad samples above which the source raises an error.
    aspect: 'crop', 'pad' or 'buckets', see `aspect.shapes`.
    where: conditions that a sample must meet, see `where`.
    captions: columns of the metadata that hold captions; None: the default.

  Attributes:
    needs: a sentence on what the source needs, for the message if it is empty.
    where: the source's name in messages.
    bad: {name: reason} of the bad samples, also of those that failed since.
    unused: {name: reason} of files that are no samples; set by `scan`.
    replaced: number of times that a sample was replaced.
    skipped: ((name, reason), …) of all samples skipped at the start.

  Raises:
    DataError: too many samples are bad, or none is left.
    UsageError: no such aspect, condition or column.
  """

  needs: ClassVar[str] = ''
  bad: dict[str, str]
  unused: Mapping[str, str] = {}

  def __init__(
    self,
    path: AnyPath,
    size: int,
    *,
    resize: str = 'area',
    max_bad: float = MAX_BAD,
    aspect: str = 'crop',
    where: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
  ) -> None:
    self.where, self.size, self.resize = str(path), size, resize
    self.max_bad, self.replaced, self.aspect = max_bad, 0, aspect
    self.shapes = aspects.shapes(size, aspect)
    self.conditions = conditions.parse(where)
    self.columns = [captions] if isinstance(captions, str) else captions
    self._lock = threading.Lock()
    self.bad, left = self.scan(path)
    skipped = self.bad | dict(left)
    self.skipped = (*skipped.items(), *self.unused.items())
    if not len(self):
      reason = summary(self.skipped) or 'there are none'
      raise NoImage(
        f'{self.where} has no image to train on at {size} pixels: {reason}. '
        f'{self.needs}'.strip(),
        self,
      )
    more = self.unlisted_bad + sum(self.unlisted.values())
    self._total = len(self) + len(skipped) + more
    self._check_fraction()
    if self.skipped:
      _tell(
        f'{self.where}: {len(self)} images are used and '
        f'{len(self.skipped) + more} are skipped: {summary(self.skipped)}'
        f'{f", and {more} more" if more else ""}.'
      )

  def scan(self, path: AnyPath) -> tuple[dict[str, str], Mapping[str, str]]:
    """Finds and checks the samples; called once, at construction.

    Returns:
      {name: reason} of the bad samples, and of those that are good but left
      out, as too small or by `self.conditions`.
    """
    raise NotImplementedError

  def select(
    self,
    names: Sequence[str],
    sizes: np.ndarray,
    columns: Mapping[str, conditions.Values],
  ) -> tuple[np.ndarray, dict[str, str]]:
    """Which samples are used, in the order of their shapes; sets `buckets`.

    Args:
      names: of all good samples.
      sizes: [n, 2], their widths and heights.
      columns: {name: n values} of what `self.conditions` are about, besides
        the sizes.

    Returns:
      (positions in `names`, {name: reason} of those that are left out).
    """
    number = aspects.choose(sizes, self.size, self.aspect)
    columns = {**columns, **conditions.image_columns(sizes)}
    failed = conditions.first_failure(self.conditions, columns, len(names))
    small = np.flatnonzero(number < 0).tolist()
    left = {names[i]: self.why_left(-1) for i in small}
    for i in np.flatnonzero((number >= 0) & (failed >= 0)).tolist():
      left[names[i]] = self.why_left(failed[i])
    used = np.flatnonzero((number >= 0) & (failed < 0))
    order = used[np.argsort(number[used], kind='stable')]
    self.set_buckets(np.bincount(number[used], minlength=len(self.shapes)))
    return order, left

  def why_left(self, condition: int) -> str:
    """Why a sample is left out: it is too small (−1), or a condition fails."""
    if condition < 0:
      return f'it is smaller than {self.size} pixels'
    return conditions.reason(self.conditions[condition])

  def set_buckets(self, counts: Iterable[int]) -> None:
    """Sets `buckets` of examples that come shape by shape.

    Args:
      counts: of the examples of each of `self.shapes`.
    """
    ends = np.cumsum([*counts]).tolist()
    if self.aspect == 'buckets':
      self.buckets = {
        shape: range(start, end)
        for shape, start, end in zip(self.shapes, [0, *ends], ends)
        if end > start
      }

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_lock'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def __getitem__(self, i: int) -> dict[str, Any]:
    """An example, see `Source`.

    Raises:
      DataError: too many samples are bad, or none nearby can be read.
    """
    if not 0 <= i < len(self):
      raise IndexError(f'sample {i} of {len(self)}')
    for j in self._nearest(int(i)):
      try:
        return retried(self.example, j)
      except (BadSample, OSError) as error:
        reason = str(error)
        self.note(self.name(j), reason)
    raise DataError(
      f'{self.where}: no sample from {self.name(int(i))} on can be read '
      f'({reason}); check the disk.'
    )

  def _nearest(self, i: int) -> Iterator[int]:
    """A sample and those that may replace it, which have its shape."""
    found = (some for some in self.buckets.values() if i in some)
    alike: Sequence[int] = next(found, range(len(self)))
    start = alike.index(i)
    for step in range(min(SUBSTITUTES, len(alike))):
      yield alike[(start + step) % len(alike)]

  def read(self, i: int) -> tuple[bytes, Sequence[str]]:
    """The encoded image and the captions of a sample.

    Raises:
      BadSample, OSError: it cannot be used.
    """
    raise NotImplementedError

  def example(self, i: int) -> dict[str, Any]:
    """Sample `i`, never a replacement; raises BadSample or OSError."""
    data, captions = self.read(i)
    image = decode(data, self.size, self.resize, self.aspect)
    return {'image': image} | captioned(captions)

  def to_store(self, i: int) -> dict[str, Any]:
    if type(self).example is not Checked.example:
      return self.example(i)
    data, captions = self.read(i)
    image = fitted(data, self.size, self.resize, self.aspect)
    return {'image': image, 'file': data} | captioned(captions)

  def note(self, name: str, reason: str) -> None:
    """Counts a bad sample; raises DataError if there are too many."""
    with self._lock:
      self.replaced += 1
      new = name not in self.bad
      if new:
        self.bad[name] = reason
    if new:
      logging.getLogger(__name__).warning(
        '%s: %s is replaced by its neighbour, because %s',
        *(self.where, name, reason),
      )
    self._check_fraction()

  def _check_fraction(self) -> None:
    number = len(self.bad) + self.unlisted_bad
    if number > self.max_bad * self._total:
      fraction = number / self._total
      raise DataError(
        f'{self.where}: {number} of {self._total} samples are bad, '
        f'{fraction:.2%} where data.max_bad allows {self.max_bad:.2%}: '
        f'{summary(self.bad.items())}; repair or remove them, or raise '
        'data.max_bad.'
      )


def captioned(captions: Sequence[str]) -> dict[str, Any]:
  """The entries of an example with these captions.

  Raises:
    TypeError: there are none, or one is not text.
  """
  if not captions or not all(isinstance(text, str) for text in captions):
    raise TypeError('no captions')
  several = {'captions': tuple(captions)} if len(captions) > 1 else {}
  return {'caption': captions[0]} | several


def clean_captions(texts: Any) -> tuple[str, ...]:
  """The usable ones of a sample's captions, cleaned, each once.

  Args:
    texts: a caption (str or UTF-8 bytes), a sequence of them, or None.

  Raises:
    BadSample: none is usable; says what is wrong with the last.
  """
  problem = BadSample('it has no caption')
  good = dict[str, None]()
  for text in texts if isinstance(texts, list | tuple) else [texts]:
    try:
      if text is not None:
        good[clean_caption(text)] = None
    except BadSample as error:
      problem = error
  if not good:
    raise problem
  return tuple(good)


def clean_caption(text: str | bytes) -> str:
  """A caption with single spaces and no surrounding whitespace.

  Args:
    text: str, or UTF-8 bytes.

  Raises:
    BadSample: it is not UTF-8, empty, longer than `MAX_CAPTION`, or binary.
  """
  if not isinstance(text, str | bytes):
    raise BadSample('its caption is not text')
  if isinstance(text, bytes):
    try:
      text = text.decode('utf-8-sig')
    except UnicodeDecodeError as error:
      raise BadSample('its caption is not UTF-8') from error
  if len(text) > MAX_CAPTION:
    raise BadSample(f'its caption is longer than {MAX_CAPTION} characters')
  if '\0' in text:
    raise BadSample('its caption is binary')
  # JSON can contain lone surrogates, which UTF-8 cannot encode.
  if _SURROGATE.search(text):
    raise BadSample('its caption is not UTF-8')
  text = ' '.join(text.split())
  if not text:
    raise BadSample('its caption is empty')
  return text


def survey(
  keys: Sequence[Key], examine: Callable[[Key], Found], label: str
) -> tuple[dict[Key, Found], dict[Key, str]]:
  """Examines samples in threads.

  Args:
    keys: of the samples, each different.
    examine: key -> result; raises BadSample or OSError if the sample is bad.
    label: of the progress line.

  Returns:
    ({key: result} of the good samples, {key: reason} of the bad ones).
  """

  def one(key: Key) -> Found | BadSample:
    try:
      return retried(examine, key)
    except BadSample as error:
      return error
    except OSError as error:
      return BadSample(f'{UNREADABLE} ({error.strerror or error})')

  good: dict[Key, Found] = {}
  bad: dict[Key, str] = {}
  progress = Progress(label, len(keys))
  with thread_pool() as pool:
    # In chunks: pool.map alone would queue all samples at once.
    for start in range(0, len(keys), TURN):
      turn = keys[start : start + TURN]
      for key, result in zip(turn, pool.map(one, turn)):
        if isinstance(result, BadSample):
          bad[key] = str(result)
        else:
          good[key] = result
      progress.add(len(turn))
  progress.close()
  return good, bad


def retried(read: Callable[[Key], Found], key: Key) -> Found:
  """`read(key)`, repeated if the disk, the network or a bucket fails.

  Raises:
    OSError: the last error.
    DataError: the process has too many open files.
  """
  for pause in (*PAUSES, None):
    try:
      return read(key)
    except OSError as error:
      text = os.strerror(errno.EMFILE)
      if error.errno == errno.EMFILE or text in str(error):
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise DataError(
          f'this process may open no more than {allowed} files at once; raise '
          f'the limit with `ulimit -n {max(4096, 4 * allowed)}`.'
        ) from error
      if pause is None or isinstance(error, _FINAL):
        raise
      time.sleep(pause)
  raise AssertionError('unreachable')


def thread_pool() -> concurrent.futures.ThreadPoolExecutor:
  """Threads that read and decode samples."""
  return concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))


def summary(skipped: Iterable[tuple[str, str]]) -> str:
  """'2 because it has no caption (a.png, b.png), …', most common first."""
  by_reason: dict[str, list[str]] = collections.defaultdict(list)
  for name, reason in skipped:
    by_reason[reason].append(name)
  return ', '.join(
    f'{len(names)} because {reason} ({", ".join(names[:EXAMPLES])}'
    f'{", …" if len(names) > EXAMPLES else ""})'
    for reason, names in sorted(by_reason.items(), key=lambda e: -len(e[1]))
  )


def write_skipped(
  file: pathlib.Path, skipped: Iterable[tuple[str, str]]
) -> None:
  """Writes skipped samples as JSON Lines of `name` and `reason`."""
  files.make_folder(file.parent)
  files.write_lines(file, [{'name': n, 'reason': r} for n, r in skipped])


@functools.cache
def _tell(message: str) -> None:
  """Warns once; a run opens its source for training and for previews."""
  logging.getLogger(__name__).warning('%s', message)
