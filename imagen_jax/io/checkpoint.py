"""Checkpoints of a training state: asynchronous, atomic, with digests.

  checkpoints/300/state/…                        the arrays, by Orbax
  checkpoints/300/manifest-00000-of-00001.json   digests, leaves, `extra`

A step is complete once its manifest exists; see `manifest.py`. A state is a
tree of arrays of at least one element each (Orbax stores no empty ones); typed
keys are restored as typed keys.
"""

import concurrent.futures
import contextlib
import datetime
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.metadata import array_metadata_store

from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import files, leaves, manifest
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
  ) -> None:
    """Opens a directory, which need not exist before the first save.

    Args:
      directory: a local path or a bucket's, such as gs://….
      keep_last: how many of the newest steps are kept.
      keep_every: steps that are a multiple of it are kept for good.
    """
    if keep_last < 1:
      raise UsageError(f'train.keep_last is {keep_last}; it is at least 1.')
    if '://' not in str(directory):  # orbax takes no relative path
      directory = os.path.abspath(directory)
    try:
      self.directory = epath.Path(directory)
      self.directory.exists()
    except (ImportError, KeyError) as error:  # of a bucket
      raise UsageError(
        f'train.checkpoint_dir is {directory}, which cannot be opened '
        f'({error}); install what it needs, or give a local path.',
        key='config.train.checkpoint_dir',
      ) from error
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
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(type_handler_registry=_handlers())
      )
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def all_steps(self) -> list[int]:
    """The complete steps, in order; digests are not checked."""
    return [s for s in self._steps() if manifest.is_whole(self._path(s))]

  def latest_step(self) -> int | None:
    """The newest complete step, or None."""
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
    for later in self._steps():
      if later > step and jax.process_index() == 0:
        self._remove(later)

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
    if step is None and jax.process_count() > 1:
      # One process may see a file before another does.
      newest, _ = self._newest_good(None)
      step = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
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
    args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    return self._read(step, abstract_state, args), body['extra'], step

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

  def _steps(self) -> list[int]:
    """Every step that has a directory, complete or not, in order."""
    if not self.directory.is_dir():
      return []
    names = (path.name for path in self.directory.iterdir())
    return sorted(int(name) for name in names if name.isdecimal())

  def _make_room(self, step: int) -> None:
    """Removes what a killed run left at this step; refuses an earlier step."""
    later = [s for s in self.all_steps() if s >= step and s not in self._bad]
    if later:
      raise ModelError(
        f'{self.directory} already holds step {later[-1]}, so step {step} '
        'is not saved there: resume from it, or use another workdir.'
      )
    with self._saving(step):
      self.directory.mkdir(parents=True, exist_ok=True)
      if jax.process_index() == 0:
        for path in self.directory.iterdir():
          if '.orbax-checkpoint-tmp' in path.name:
            path.rmtree()
        self._remove(step)

  def _remove(self, step: int) -> None:
    path = self._path(step)
    if path.exists():
      # Manifests first: a partly removed step must not look complete.
      for name in path.glob('manifest-*'):
        name.unlink()
      path.rmtree()
    self._bad.discard(step)

  def _finish(self, step: int, fields: Mapping[str, Any]) -> None:
    """In the background: commits, writes the manifest, removes old steps."""
    self._orbax.wait_until_finished()
    first = jax.process_index() == 0
    manifest.write(
      self._path(step),
      fields if first else {'step': fields['step']},
      process=jax.process_index(),
      processes=jax.process_count(),
    )
    if first:
      good = [s for s in self.all_steps() if s not in self._bad]
      keep = {step, *good[-self.keep_last :]}
      if self.keep_every:
        keep.update(s for s in good if s % self.keep_every == 0)
      for old in self._steps():
        if old not in keep:
          self._remove(old)

  # Reading and writing.

  @contextlib.contextmanager
  def _saving(self, step: int) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      text = str(error).strip() or type(error).__name__
      # orbax buries the file system's error in a long message.
      reason = files.storage_reason(error) or text.splitlines()[0][:200]
      last = self.latest_step()
      # orbax drops the writes that it had not started, without awaiting them.
      warnings.filterwarnings(
        'ignore', "coroutine 'async_serialize.* was never awaited"
      )
      raise ModelError(
        f'checkpoint {self._path(step)} could not be written ({reason}); '
        + (f'step {last} is the last good one: ' if last is not None else '')
        + 'check space and permissions, then run the same command again.'
      ) from error

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
    """Verifies a step and returns the first process's manifest."""
    path = self._path(step)
    body = manifest.verify(path)[0]
    if body['step'] != step:
      raise manifest.Damaged(f'{path} is a copy of step {body["step"]}.')
    return body

  def _newest_good(self, step: int | None) -> tuple[int, dict[str, Any]]:
    self.wait()
    if step is not None:
      return step, self._verified(step)
    steps = self._steps()
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


def _handlers() -> Any:
  """Orbax's handlers of arrays; a small replicated array is written once.

  Orbax would cut each replicated array into a slice per replica, so that all of
  them write. Each slice is a program to compile and to start, which for small
  arrays takes longer than to write them.
  """
  arrays = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES,
    array_metadata_store=array_metadata_store.Store(),  # of typed keys
  )
  return ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, arrays)
  )
