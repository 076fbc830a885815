"""Checkpoints of a training state: asynchronous, atomic, with digests.

  checkpoints/300/state/…         the arrays, by Orbax
  checkpoints/300/manifest.json   digests, leaves, `extra`

A step is whole once its manifest exists. Process 0 writes it, after every
process has written its part and digested its share of the files; see
`manifest.py`. No step is removed before a newer one is whole. A state is a tree
of arrays of at least one element each (Orbax stores no empty ones); typed keys
are restored as typed keys.
"""

import concurrent.futures
import contextlib
import datetime
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.metadata import array_metadata_store

from imagen_jax import sharding
from imagen_jax.errors import ImagenError, ModelError, UsageError
from imagen_jax.io import bucket, files, hosts, leaves, manifest
from imagen_jax.io.files import AnyPath

_log = logging.getLogger(__name__)

# Of a replicated array that several replicas write together.
_MIN_SLICE_BYTES = 1 << 20


class Checkpoints:
  """The checkpoints of one run, in one directory.

  At most one save is in progress. `close`, or leaving the `with` block, waits
  for it.
  """

  def __init__(
    self,
    directory: AnyPath,
    *,
    keep_last: int = 3,
    keep_every: int | None = None,
    alone: bool = False,
  ) -> None:
    """Opens a directory, which need not exist before the first save.

    Args:
      directory: a local path or a bucket's, such as gs://….
      keep_last: how many of the newest steps are kept.
      keep_every: steps that are a multiple of it are kept for good.
      alone: the directory is this process's own, for the shards of its
        devices; otherwise all processes of a job share it and call every method
        together.
    """
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
    self._last_saved: int | None = None
    self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
    self._finishing: concurrent.futures.Future[None] | None = None
    self._worker = concurrent.futures.ThreadPoolExecutor(1)
    # Orbax's threads, and writes queued behind a failed one in their event
    # loop, log a traceback of what is raised here in one sentence.
    for name in ('absl', 'asyncio'):
      logging.getLogger(name).addFilter(_not_of_a_thread)
    me = jax.process_index()
    self._rank: int = 0 if alone else me
    self._count: int = 1 if alone else jax.process_count()
    self._hosts_agree = hosts.alone if alone else hosts.agree
    options = ocp.options.MultiprocessingOptions()
    if alone:
      options = ocp.options.MultiprocessingOptions(
        primary_host=me,
        active_processes={me},
        barrier_sync_key_prefix=f'alone_{me}',
      )
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(
          multiprocessing_options=options,
          type_handler_registry=_handlers(options.primary_host, alone),
        ),
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
      ),
      multiprocessing_options=options,
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Every step that has a directory, whole or not, in order."""
    try:
      names = [path.name for path in self.directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
      return []
    return sorted(int(name) for name in names if name.isdecimal())

  def all_steps(self) -> list[int]:
    """The whole steps, in order; digests are not checked."""
    return [s for s in self.steps() if manifest.is_whole(self._path(s))]

  def latest_step(self) -> int | None:
    """The newest whole step, or None."""
    return max(self.all_steps(), default=None)

  @property
  def saving(self) -> bool:
    """Whether a save is in progress."""
    return self._finishing is not None and not self._finishing.done()

  def save(
    self,
    step: int,
    state: Any,
    extra: Mapping[str, Any] | None = None,
    *,
    wait: bool = False,
  ) -> None:
    """Saves a state in the background; its buffers may be donated right away.

    An error of the save is raised by the next `save`, `wait` or `close`.
    Saving the last saved step again does nothing.

    Args:
      step: its number.
      state: tree of arrays or numbers.
      extra: JSON-ready dict stored with it.
      wait: return only when the step and its manifest are on disk.

    Raises:
      ModelError: the directory cannot be written, or holds this step or a
        later one of another run.
    """
    self.wait()
    if step != self._last_saved:
      fields = {
        'step': int(step),
        'time': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
        'extra': extra or {},
        'leaves': leaves.describe(state),
      }
      self._make_room(step)
      arrays = ocp.args.PyTreeSave(leaves.arrays(state))
      with self._saving(step):
        self._orbax.save(
          self._path(step), args=ocp.args.Composite(state=arrays)
        )
      self._last_saved = step
      self._finishing = self._worker.submit(self._finish, step, fields)
      self._pending = step, self._finishing
    if wait:
      self.wait()

  def discard_after(self, step: int) -> None:
    """Removes the later steps, which a run resumed from `step` saves anew."""

    def remove(_: Any) -> None:
      for later in self.steps():
        if later > step:
          self._remove(later)

    self._agree('discard', remove)

  def wait(self) -> None:
    """Waits until the last saved step and its manifest are on disk.

    Raises:
      ModelError: they could not be written.
    """
    if self._pending is not None:
      (step, finished), self._pending = self._pending, None
      with self._saving(step):
        finished.result()

  def close(self) -> None:
    """Waits for the last save and stops the threads."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()
      self._orbax.close()

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

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> tuple[Any, dict[str, Any], int]:
    """Restores the newest good step, onto any mesh.

    Incomplete or damaged steps are skipped with a warning.

    Args:
      abstract_state: tree of arrays or `jax.ShapeDtypeStruct`s; a leaf without
        a sharding is put on the first device.
      step: this step only; the newest good one by default.

    Returns:
      (state, extra, step).

    Raises:
      ModelError: no step is good, or the state has other leaves or shapes.
    """
    step, body = self._newest_good(step)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract_state = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=getattr(x, 'sharding', None) or default
      ),
      abstract_state,
    )
    wanted = leaves.describe(abstract_state)
    leaves.check(self._path(step), body['leaves'], wanted)
    spread = abstract_state
    if self._count > 1:
      spread = sharding.spread(abstract_state, _MIN_SLICE_BYTES)
    args = ocp.checkpoint_utils.construct_restore_args(spread)
    state = self._read(step, spread, args)
    return sharding.replace(state, abstract_state), body['extra'], step

  def restore_subtree(
    self, name: str, step: int | None = None
  ) -> tuple[Any, dict[str, Any], int]:
    """Restores one field of the state only, such as 'ema_params'.

    Every file's digest is still checked.

    Args:
      name: a top-level field that holds nested dicts of arrays.
      step: this step only; the newest good one by default.

    Returns:
      (nested dict of numpy arrays, extra, step).

    Raises:
      ModelError: no step is good, or the state has no such field.
    """
    step, body = self._newest_good(step)
    wanted = leaves.subtree(body['leaves'], name)
    if not wanted:
      fields = sorted({path.split('/')[0] for path in body['leaves']})
      raise ModelError(
        f'{self._path(step)} holds no {name}; it holds {", ".join(fields)}.'
      )
    numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    args = jax.tree.map(lambda _: numpy, wanted)
    tree = self._read(step, wanted, args)
    return tree[name], body['extra'], step

  # Directories.

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

  def _finish(self, step: int, fields: Mapping[str, Any]) -> None:
    """In the background: commits, writes the manifest, removes old steps."""
    self._orbax.wait_until_finished()
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

  # Reading and writing.

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

  def _read(self, step: int, wanted: Any, restore_args: Any) -> Any:
    # Partial: branches without leaves need not agree.
    args = ocp.args.PyTreeRestore(
      wanted, restore_args=restore_args, partial_restore=True
    )
    try:
      return self._orbax.restore(
        self._path(step), args=ocp.args.Composite(state=args)
      )['state']
    except Exception:
      # A running training may have removed the step; if so, say that.
      manifest.verify(self._path(step))
      raise

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
    self.wait()
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


def _not_of_a_thread(record: logging.LogRecord) -> bool:
  message = record.getMessage()
  if 'exception was never retrieved' in message and record.exc_info:
    return files.storage_reason(record.exc_info[1]) is None
  return '_SignalingThread' not in message and 'save thread' not in message


def _handlers(primary_host: int | None, alone: bool) -> Any:
  """Orbax's handlers of arrays; a small replicated array is written once.

  Orbax would cut each replicated array into a slice per replica, so that all of
  them write. Each slice is a program to compile and to start, which for small
  arrays takes longer than to write them.
  """
  arrays = ocp.type_handlers.ArrayHandler(
    primary_host=primary_host,
    replica_id=None if alone else 0,  # None: those of this process
    use_replica_parallel=not alone,
    min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES,
    # Of typed keys; it expects all processes in one directory.
    array_metadata_store=None if alone else array_metadata_store.Store(),
  )
  return ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, arrays)
  )
