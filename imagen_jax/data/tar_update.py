"""Makes the index of a set of tars, or renews it, and opens it."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping

from imagen_jax.data import tar_index
from imagen_jax.data.progress import Progress
from imagen_jax.data.tar_index import Found, Index
from imagen_jax.data.tar_scan import scan
from imagen_jax.errors import DataError, ImagenError
from imagen_jax.io import bucket, ranges
from imagen_jax.io.ranges import State

SAVE = 600  # seconds between two saves of an index that is being made


def common_folder(tars: Iterable[str]) -> str:
  """The folder that all tars are in, at any depth."""
  heads = [tar.rpartition('/')[0] for tar in tars]
  scheme = heads[0].partition('://')[0]
  if bucket.is_bucket(heads[0]):
    rests = [head.partition('://')[2] for head in heads]
    return f'{scheme}://{os.path.commonpath(rests)}'
  return os.path.commonpath(heads) or '.'


def below(root: str, tar: str) -> str:
  """The path of a tar below its set's folder."""
  if bucket.is_bucket(root):
    return tar.removeprefix(root).lstrip('/')
  return os.path.relpath(tar, root)


def open_index(
  root: str, tars: Mapping[str, State | None], where: str | None
) -> Index:
  """The index of tars; of several processes, the first one makes it.

  Args:
    root: the tars' common folder.
    tars: {path: its state, or None if that is not known}.
    where: the index's file; None: beside the tars, or in the cache.

  Raises:
    DataError: `where` was made by imagen-index, of other tars; or a tar cannot
      be read.
  """
  work = _Set(root, tars, where)
  index = _load(_first(f'index of {root}', work.make))
  if index is None or work.changed(index):
    index = _load(work.make())  # of a host with a disk of its own
  assert index is not None
  return index


class _Set:
  """A set of tars whose index is needed; see `open_index`."""

  def __init__(
    self, root: str, tars: Mapping[str, State | None], where: str | None
  ) -> None:
    self.root, self.where = root, where
    self.paths = {below(root, tar): tar for tar in tars}
    self._states = dict(tars)
    beside = f'{root}/{tar_index.NAME}'
    self.places = [beside, ''] if where is None else [where]

  def changed(self, index: Index) -> list[str]:
    """The names of the tars that the index does not have as they are now."""
    changed = []
    for name, path in self.paths.items():
      tar = index.tars.get(name)
      same = tar is not None
      if tar is not None and (tar.time is not None or self._states[path]):
        size, when = self._state(path)
        same = size == tar.bytes and tar.time in (None, when)
      if not same:
        changed.append(name)
    return changed

  def make(self) -> str:
    """The place of an index that has all tars; it is made if there is none."""
    old = None
    for place in self.places:
      index = _load(self._at(place))
      if index is not None:
        changed = self.changed(index)
        if not changed:
          return self._at(place)
        if any(tar.time is None for tar in index.tars.values()):
          raise DataError(
            f'{place} is an index of other tars: {changed[0]} is new or has '
            'changed since; make it again with imagen-index.'
          )
        old = old or index
    return self._renew(old, self.changed(old) if old else [*self.paths])

  def _renew(self, old: Index | None, names: list[str]) -> str:
    """Scans tars, and writes them and the others of the old index."""
    if self.where is not None:
      tar_index.check_place(self.where, key='config.data.index')
    fresh: dict[str, Found] = {}
    kept = [] if old is None else [old]
    progress = Progress(f'indexing {self.root}: tars', len(names))
    saved = time.monotonic()
    for name in names:
      path = self.paths[name]
      fresh[name] = scan(path, name, self._state(path)[1])
      progress.add()
      if time.monotonic() - saved > SAVE:
        self._write(kept, fresh)  # for the next start, if this one is killed
        saved = time.monotonic()
    progress.close()
    return self._write(kept, fresh)

  def _write(self, kept: list[Index], fresh: Mapping[str, Found]) -> str:
    """Writes an index to the first place that takes it, and returns that."""
    for place in self.places:
      try:
        tar_index.write(self._at(place), tar_index.merge(kept, fresh))
        return self._at(place)
      except (OSError, ImagenError) as error:
        if place == self.places[-1]:
          raise DataError(
            f'{self._at(place)}, the index of {self.root}, cannot be written '
            f'({error}); set data.index to a file that can.'
          ) from error
        text = '%s cannot be written (%s): the index goes into the cache'
        logging.getLogger(__name__).warning(text, place, error)
    raise AssertionError('unreachable')

  def _at(self, place: str) -> str:
    if place:
      return place
    local = not bucket.is_bucket(self.root)
    root = os.path.abspath(self.root) if local else self.root
    return str(tar_index.in_cache(root))

  def _state(self, path: str) -> State:
    known = self._states[path]
    return ranges.state(path) if known is None else known


def _load(place: str) -> Index | None:
  """The index of a place; None if there is none, or one that is damaged."""
  try:
    if bucket.is_bucket(place) and not bucket.at(place).exists():
      return None
    return Index(tar_index.local(place))
  except DataError as error:
    if not isinstance(error.__cause__, FileNotFoundError):
      logging.getLogger(__name__).warning('%s', error)
    return None


def _first(name: str, make: Callable[[], str]) -> str:
  """What the first of the job's processes makes, on all of them."""
  jax = sys.modules.get('jax')
  if jax is None or not jax.distributed.is_initialized():
    return make()
  from imagen_jax.io import hosts

  return hosts.agree(name, lambda: None, lambda _: make())
