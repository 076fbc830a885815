"""The numbered steps of a directory: which are whole, and which are removed.

A step is a folder. It is whole once its manifest exists. Process 0 writes that
after every process has written its part and digested its share of the files. No
step is removed before a newer one is whole.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from imagen_jax.errors import ImagenError, ModelError, UsageError
from imagen_jax.io import bucket, files, hosts, manifest
from imagen_jax.io.files import AnyPath

_log = logging.getLogger(__name__)


class Steps:
  """The steps of one run; `Checkpoints` saves and restores them."""

  def __init__(
    self,
    directory: AnyPath,
    keep_last: int,
    keep_every: int | None,
    alone: bool,
  ) -> None:
    if keep_last < 1:
      raise UsageError(f'train.keep_last is {keep_last}; it is at least 1.')
    if not bucket.is_bucket(directory):  # orbax takes no relative path
      directory = os.path.abspath(directory)
    self.directory = epath.Path(
      bucket.at(directory, key='config.train.checkpoint_dir')
    )
    self.keep_last = keep_last
    self.keep_every = keep_every
    self._bad: set[int] = set()
    self._rank: int = 0 if alone else jax.process_index()
    self._count: int = 1 if alone else jax.process_count()
    self._hosts_agree = hosts.alone if alone else hosts.agree

  def steps(self) -> list[int]:
    """Every step that has a directory, whole or not, in order."""
    return manifest.steps(self.directory)

  def all_steps(self) -> list[int]:
    """The whole steps, in order; digests are not checked."""
    return sorted(manifest.whole_steps(self.directory))

  def latest_step(self) -> int | None:
    """The newest whole step, or None."""
    return next(manifest.whole_steps(self.directory), None)

  def discard_after(self, step: int) -> None:
    """Removes the later steps, which a run resumed from `step` saves anew."""

    def remove(_: Any) -> None:
      for later in self.steps():
        if later > step:
          self._remove(later)

    self._agree('discard', remove)

  def verify(self, step: int) -> dict[str, Any]:
    """Checks every file of a step against its digest.

    Returns:
      the step's `extra`.

    Raises:
      ModelError: naming the file that is missing or damaged.
    """
    return self._verified(step)['extra']

  def extra(self, step: int) -> dict[str, Any]:
    """A step's `extra`; only the manifest's own digest is checked.

    Raises:
      ModelError: there is no manifest, or it is damaged.
    """
    return manifest.read(self._path(step))['extra']

  def newest_good(self) -> tuple[int, str]:
    """(step, digest) of the newest step whose files are all intact.

    Raises:
      ModelError: no step is good.
    """
    step, body = self._newest_good(None)
    return step, body['digest']

  def _path(self, step: int) -> epath.Path:
    return self.directory / str(step)

  def _agree(self, name: str, decide: Callable[[Any], Any]) -> Any:
    """What process 0 finds, on every process."""
    return self._hosts_agree(f'{self.directory}/{name}', lambda: None, decide)

  def _share(self, sizes: Mapping[str, int]) -> list[str]:
    """The files that this process digests, given the bytes of all."""
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    return names[self._rank :: self._count]

  def _make_room(self, step: int) -> None:
    """Removes what a killed run left at this step; refuses an earlier step."""

    def remove(_: Any) -> None:
      with self._saving(step):
        if not bucket.is_bucket(self.directory):
          files.make_folder(self.directory)
          for path in self.directory.iterdir():
            if '.orbax-checkpoint-tmp' in path.name:
              path.rmtree()
        whole = self.all_steps()
        later = [s for s in whole if s >= step and s not in self._bad]
        if not later:
          self._remove(step)
      if later:
        raise ModelError(
          f'{self.directory} already holds step {later[-1]}, so step {step} '
          'is not saved there: resume from it, or use another workdir.'
        )

    self._agree('room', remove)
    self._bad.discard(step)

  def _remove(self, step: int) -> None:
    path = self._path(step)
    # The manifest first: a partly removed step must not look whole.
    for remove in (path / manifest.NAME).unlink, path.rmtree:
      with contextlib.suppress(FileNotFoundError):
        remove()
    self._bad.discard(step)

  def _commit(self, step: int, fields: Mapping[str, Any]) -> None:
    """Makes a written step whole, then removes old steps."""
    path = self._path(step)
    # One listing for all processes, and each digests its share.
    sizes = self._agree('files', lambda _: files.tree(path))

    def commit(said: list[dict[str, files.Digest]]) -> None:
      digests = {name: d for each in said for name, d in each.items()}
      manifest.write(path, fields, digests)

    digest = lambda: manifest.digests(path, self._share(sizes))
    self._hosts_agree(f'{path}', digest, commit)
    if self._rank == 0:
      self._retire(step)

  def _retire(self, step: int) -> None:
    """Removes what is older than the steps to keep; `step` is whole."""
    good = [s for s in self.all_steps() if s not in self._bad]
    if step not in good:
      raise OSError(f'step {step} was written and cannot be seen')
    keep = {step, *good[-self.keep_last :]}
    if self.keep_every:
      keep.update(s for s in good if s % self.keep_every == 0)
    for old in self.steps():
      if old not in keep:
        self._remove(old)

  @contextlib.contextmanager
  def _saving(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      # orbax buries the file system's error in a long message.
      reason = files.storage_reason(error)
      known = isinstance(error, (OSError, ValueError, RuntimeError))
      if isinstance(error, ImagenError) or not (known or reason):
        raise
      text = str(error).strip() or type(error).__name__
      reason = reason or text.splitlines()[0][:200]
      last = self._last_whole()
      # orbax drops the writes that it had not started, without awaiting them.
      warnings.filterwarnings(
        'ignore', "coroutine 'async_serialize.* was never awaited"
      )
      raise ModelError(
        f'checkpoint {self._path(step)} could not be written ({reason}); '
        + (f'step {last} is the last good one: ' if last is not None else '')
        + 'check space and permissions, then run the same command again.'
      ) from error

  def _last_whole(self) -> int | None:
    """`latest_step`, or None if even that fails."""
    with contextlib.suppress(Exception):
      return self.latest_step()
    return None

  def _verified(self, step: int) -> dict[str, Any]:
    """Verifies a step, each process its share; returns the manifest.

    Raises:
      Damaged: on every process, also where another found the damage.
    """
    path = self._path(step)
    body: dict[str, Any] = {}

    def problem() -> str | None:
      try:
        body.update(manifest.read(path))
        if body['step'] != step:
          return f'{path} is a copy of step {body["step"]}.'
        sizes = {name: d['bytes'] for name, d in body['files'].items()}
        manifest.verify(path, self._share(sizes))
      except manifest.Damaged as error:
        return str(error)
      return None

    first = lambda said: next(filter(None, said), None)
    found = self._hosts_agree(f'{self.directory}/verify', problem, first)
    if found:
      raise manifest.Damaged(found)
    return body

  def _newest_good(self, step: int | None) -> tuple[int, dict[str, Any]]:
    if step is not None:
      return step, self._verified(step)
    steps = self._agree('steps', lambda _: self.steps())
    for step in reversed(steps):
      try:
        return step, self._verified(step)
      except manifest.Damaged as error:
        self._bad.add(step)
        _log.warning('Step %s is skipped: %s', step, error)
    if steps:
      raise ModelError(
        f'{self.directory} holds no good checkpoint: all of '
        f'{", ".join(map(str, steps))} are incomplete or damaged; restore '
        'them from a copy, or start again in another workdir.'
      )
    raise ModelError(
      f'{self.directory} holds no checkpoint; train first, or check the path.'
    )
