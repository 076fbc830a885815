"""Checkpoints of a training state: asynchronous, atomic, with digests.

  checkpoints/300/state/…         the arrays, by Orbax
  checkpoints/300/manifest.json   digests, leaves, `extra`

`steps.py` tells when a step is whole and which steps are kept. A state is a
tree of arrays of at least one element each (Orbax stores no empty ones); typed
keys are restored as typed keys.
"""

import concurrent.futures
import datetime
import logging
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import array_metadata_store

from imagen_jax import sharding
from imagen_jax.errors import ModelError
from imagen_jax.io import files, leaves, manifest
from imagen_jax.io.files import AnyPath
from imagen_jax.io.steps import Steps

# Of a replicated array that several replicas write together.
_MIN_SLICE_BYTES = 1 << 20


class Checkpoints(Steps):
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
    super().__init__(directory, keep_last, keep_every, alone)
    self._last_saved: int | None = None
    self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
    self._finishing: concurrent.futures.Future[None] | None = None
    self._worker = concurrent.futures.ThreadPoolExecutor(1)
    # Orbax's threads, and writes queued behind a failed one in their event
    # loop, log a traceback of what is raised here in one sentence.
    for name in ('absl', 'asyncio'):
      logging.getLogger(name).addFilter(_not_of_a_thread)
    options = ocp.options.MultiprocessingOptions()
    # Folders made in the background are announced to the writers by signals
    # without a process in their names: another's would start the writers here.
    in_order = ocp.options.AsyncOptions(
      create_directories_asynchronously=not alone
    )
    if alone:
      me = jax.process_index()
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
        composite_options=ocp.CompositeOptions(
          multiprocessing_options=options, async_options=in_order
        ),
      ),
      multiprocessing_options=options,
      async_options=in_order,
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

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
    advice = 'use the config that it was trained with, or another workdir'
    leaves.check(self._path(step), body['leaves'], wanted, advice)
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

  def _finish(self, step: int, fields: Mapping[str, Any]) -> None:
    """In the background: waits for the arrays and makes the step whole."""
    self._orbax.wait_until_finished()
    self._commit(step, fields)

  def _newest_good(self, step: int | None) -> tuple[int, dict[str, Any]]:
    self.wait()
    return super()._newest_good(step)


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
