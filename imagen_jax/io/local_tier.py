"""Frequent checkpoints on each host's own disk, or its RAM disk.

Every process saves the shards that its devices hold, which crosses no network
and may happen often. A job that is started again on the same machines resumes
from the newest step that is whole on all of them, in this tier or in the shared
checkpoints; a machine that was replaced has none here.
"""

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Sequence
from typing import Any, Self

import jax

from imagen_jax.errors import ModelError
from imagen_jax.io import hosts
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.io.files import AnyPath

_log = logging.getLogger(__name__)


class LocalTier:
  """The local checkpoints of one run; two of them, since hosts may differ."""

  def __init__(self, directory: AnyPath, run: str):
    """Opens the folder of a run, which need not exist.

    Args:
      directory: on a disk of this host, the same path on every host.
      run: identifies the run; see `workdir.claim`.
    """
    folder = f'{directory}/{run}/{jax.process_index()}'
    self._checkpoints = Checkpoints(folder, keep_last=2, alone=True)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._checkpoints.close()

  def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
    """Saves this process's shards in the background; see `Checkpoints.save`."""
    about = {'shards': _shards(state), 'extra': extra}
    self._checkpoints.save(step, state, about)

  def restore(
    self, abstract_state: Any, after: int
  ) -> tuple[Any, dict[str, Any], int] | None:
    """The newest step that every process has whole.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct`s with shardings.
      after: only a step later than this one.

    Returns:
      (state, extra, step); None if there is none, or the shards of other
      devices would be needed.
    """

    def common(said: Sequence[Sequence[int]]) -> list[int]:
      steps = set.intersection(*map(set, said))
      return sorted(s for s in steps if s > after)

    self._checkpoints.wait()
    steps = hosts.agree('local', self._checkpoints.all_steps, common)
    for step in reversed(steps):
      found = self._read(abstract_state, step)
      usable = found is not None
      say = functools.partial(bool, usable)
      if hosts.agree(f'local step {step}', say, all) and found is not None:
        return *found, step
    return None

  def discard_after(self, step: int) -> None:
    """Removes later steps, which were not restored."""
    self._checkpoints.discard_after(step)

  def clear(self) -> None:
    """Removes this process's folder, once the run has finished."""
    self._checkpoints.wait()
    shutil.rmtree(self._checkpoints.directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process is still in it
      os.rmdir(self._checkpoints.directory.parent)

  def _read(
    self, abstract_state: Any, step: int
  ) -> tuple[Any, dict[str, Any]] | None:
    """(state, extra); None if it is damaged, or of other devices or shapes."""
    try:
      # Orbax would give zeros for the shards of other processes.
      if self._checkpoints.extra(step)['shards'] != _shards(abstract_state):
        raise ModelError('it holds the shards of other devices.')
      state, about, _ = self._checkpoints.restore(abstract_state, step)
    except ModelError as error:
      _log.warning('local step %s is skipped: %s', step, error)
      return None
    return state, about['extra']


def _shards(tree: Any) -> list[list[str]]:
  """For every leaf, which parts of it this process's devices hold."""
  parts = (
    leaf.sharding.addressable_devices_indices_map(leaf.shape)
    for leaf in jax.tree.leaves(tree)
  )
  return [sorted(set(map(str, where.values()))) for where in parts]
