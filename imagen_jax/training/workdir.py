"""A training directory and the config that its run was started with."""

import contextlib
import hashlib
import json
import logging
import pathlib
import secrets
import socket
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import bucket, files, hosts, lock, manifest
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.io.files import AnyPath
from imagen_jax.io.local_tier import LocalTier
from imagen_jax.io.model_folder import FORMAT_VERSION, load_config
from imagen_jax.io.paths import check_folder

# Keys and sections that may change when a run is resumed: its results do not
# depend on them.
FREE = (
  'mesh',
  'text.path',
  'text.kind',  # the digest tells whether it is another encoder
  'text.trained_by',
  'data.path',
  'data.index',
  'data.max_bad',
  'data.workers',
  'data.eval_path',
  'stage.sampling',
  'train.log_every',
  'train.checkpoint_every',
  'train.checkpoint_dir',
  'train.local_checkpoint_every',
  'train.local_checkpoint_dir',
  'train.sample_every',
  'train.keep_last',
  'train.keep_every',
  'train.ema_every',
  'train.max_bad_steps',
  'train.check_replicas_every',
  'train.startup_seconds',
  'train.hang_seconds',
  'train.eval_every',
  'train.profile_at',
  'train.log_to',
)
# Where each host of a job may have its own copy.
PER_HOST = ('run', 'text.path', 'data.path', 'data.eval_path')


@contextlib.contextmanager
def locked(workdir: pathlib.Path, checkpoint_dir: AnyPath) -> Iterator[None]:
  """Keeps other trainings out of the folders that this one writes to.

  Every process calls it; process 0 holds the locks, and the others look whether
  they see them, so that a folder which is not shared is noticed at once.

  Raises:
    UsageError: another training is there, or a process sees another folder.
  """
  folders = {_resolved(workdir): 'workdir'}
  folders.setdefault(_resolved(checkpoint_dir), 'config.train.checkpoint_dir')
  with contextlib.ExitStack() as stack:

    def acquire(_: Any) -> dict[str, str | None]:
      for folder, key in folders.items():
        stack.enter_context(lock.locked(folder, key=key))
      return {key: lock.owner(folder) for folder, key in folders.items()}

    owners = hosts.agree('lock', lambda: None, acquire)
    if jax.process_count() > 1:
      unseen = lambda: _unseen(folders, owners)
      hosts.agree('locked', unseen, lambda said: _same_folders(said, folders))
    yield


def _resolved(path: AnyPath) -> pathlib.Path:
  path = bucket.at(path)
  return path if bucket.is_bucket(path) else path.resolve()


def _unseen(
  folders: Mapping[pathlib.Path, str], owners: Mapping[str, str | None]
) -> list[str]:
  """[this host, the keys of the folders in which process 0's lock is not]."""
  missing = dict(folders)
  for _ in range(10):  # a network file system may show a new file late
    for folder, key in list(missing.items()):
      if lock.owner(folder) == owners[key]:
        del missing[folder]
    if not missing:
      break
    time.sleep(0.5)
  return [socket.gethostname(), *missing.values()]


def _same_folders(
  said: Sequence[Sequence[str]], folders: Mapping[pathlib.Path, str]
) -> None:
  """Raises a `UsageError` if a process does not see a folder's lock."""
  for folder, key in folders.items():
    blind = [
      f'{i} on {host}' for i, (host, *keys) in enumerate(said) if key in keys
    ]
    if blind:
      raise UsageError(
        f'{folder} is not one folder for all processes: what process 0 writes '
        f'there is not seen by process {", ".join(blind)}; give a path on a '
        'shared disk, or gs://BUCKET/FOLDER.',
        key=key,
      )


def local_tier(
  config: ConfigDict, workdir: pathlib.Path, run: str
) -> LocalTier | None:
  """Where a run saves on this host's own disk; None if it does not.

  A copy of a workdir has the same `run` and is another training, so the folder
  depends on both.

  Raises:
    UsageError: `train.local_checkpoint_dir` cannot be used, or is not used.
  """
  given = config.train.local_checkpoint_dir
  key = 'config.train.local_checkpoint_dir'
  if not config.train.local_checkpoint_every:
    if given:
      raise UsageError(
        f'train.local_checkpoint_dir={given} has no effect without '
        'train.local_checkpoint_every.',
        key=key,
      )
    return None
  parent = check_folder(given or tempfile.gettempdir(), key=key)
  where = hashlib.sha256(str(_resolved(workdir)).encode()).hexdigest()[:8]
  return LocalTier(parent / 'imagen_jax', f'{run}-{where}')


def newest_state(
  checkpoints: Checkpoints,
  local: LocalTier | None,
  abstract_state: Any,
  config: ConfigDict,
  force: bool,
) -> tuple[Any, dict[str, Any], int] | None:
  """(state, extra, step) of the newest good checkpoint; None: a new run.

  Raises:
    ModelError: see `must_resume` and `Checkpoints.restore`.
  """
  latest = hosts.agree(
    'latest', lambda: None, lambda _: checkpoints.latest_step() or 0
  )
  found = local.restore(abstract_state, latest) if local else None
  if found is None and must_resume(checkpoints, config, force):
    found = checkpoints.restore(abstract_state)
  if local:
    local.discard_after(found[2] if found else 0)
  return found


def must_resume(
  checkpoints: Checkpoints, config: ConfigDict, force: bool
) -> bool:
  """Whether there is a checkpoint to resume from; the same on all processes.

  A first save that was cut short is no reason to stop: at most one interval is
  lost. Anything else that is not whole was damaged or removed by others.

  Raises:
    ModelError: there are checkpoints, none of them whole, and no `force`.
  """

  def decide(_: Any) -> bool:
    steps = checkpoints.steps()
    if not steps or checkpoints.latest_step() is not None:
      return bool(steps)
    first = steps[-1] <= config.train.checkpoint_every
    if not (first or force):
      raise ModelError(
        f'{checkpoints.directory} holds no whole checkpoint: the steps '
        f'{", ".join(map(str, steps))} lack their {manifest.NAME}; restore '
        'them from a copy, begin in another workdir, or force it (--force) to '
        'begin anew here.'
      )
    logging.getLogger(__name__).warning(
      'no checkpoint is whole (%s): the run begins anew', steps
    )
    return False

  return hosts.agree('resume', lambda: None, decide)


def stored_config(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The config that a workdir's run was started with; None: there is no run.

  Raises:
    ModelError: its config.json is damaged.
  """
  if not (workdir / 'config.json').exists():
    return None
  config: dict[str, Any] = load_config(workdir)['config']
  return config


def claim(
  workdir: pathlib.Path,
  config: ConfigDict,
  text: Mapping | None,
  *,
  data: Mapping[str, Any] | None = None,
  init_from: Mapping[str, str] | None = None,
  force: bool = False,
) -> str:
  """Writes the config into a new workdir, or checks it against the stored one.

  Every process calls it; process 0 compares and writes.

  Args:
    workdir: the directory; it need not exist.
    config: the run's, complete.
    text: what `Experiment.text_record` returns, or None.
    data: `fingerprint` (None if the config determines it) and `length` of the
      data set.
    init_from: what a new run starts from; a resumed run keeps the stored one.
    force: accept another config or data set, and record it.

  Returns:
    16 hex digits that identify the run, however often it is resumed.

  Raises:
    UsageError: the workdir was started with another config, data set or text
      encoder, or a process has another one than process 0; the message names
      each key with both values.
  """
  record = {
    'format_version': FORMAT_VERSION,
    'config': json.loads(json.dumps(config.to_dict())),
    'text': text,
    'data': data,
    'init_from': init_from,
    'run': secrets.token_hex(8),
  }

  def compare(records: list[dict[str, Any]]) -> str:
    for process, other in enumerate(records):
      changed = _changes(record, other, PER_HOST)
      if changed:
        found = (
          f'{name} is {theirs!r} there and {ours!r} here'
          for name, ours, theirs in changed
        )
        raise UsageError(
          f'process {process} trains something else than process 0: '
          f'{"; ".join(found)}; start all processes with the same command, '
          'files and versions.'
        )
    return _write(workdir, record, force)

  return hosts.agree('claim', lambda: record, compare)


def _write(workdir: pathlib.Path, record: dict[str, Any], force: bool) -> str:
  """Process 0's part of `claim`, after all processes have agreed."""
  path = workdir / 'config.json'
  if path.exists():
    old = load_config(workdir)
    record['init_from'] = old.get('init_from')
    record['run'] = old.get('run') or record['run']
    changed = differences(old, record)
    if changed and not force:
      raise UsageError(
        f'{path} belongs to another run: {"; ".join(changed)}; use another '
        'workdir, repeat the command that started this one, or force it to '
        'resume all the same.',
        key='force',
      )
    if not force:
      _check_moved(workdir, old, record)
    for change in changed:
      logging.getLogger(__name__).warning('forced: %s', change)
  files.make_folder(workdir)
  files.write_json(path, record)
  return record['run']


def _check_moved(
  workdir: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
  """Refuses to begin a run anew because its checkpoints are elsewhere."""
  key = 'config.train.checkpoint_dir'
  before, now = (
    bucket.at(_flat(record).get(key) or workdir / 'checkpoints')
    for record in (old, new)
  )
  has_steps = lambda folder: (
    folder.exists() and any(p.name.isdecimal() for p in folder.iterdir())
  )
  if before != now and has_steps(before) and not has_steps(now):
    raise UsageError(
      f'the checkpoints of this run are in {before} and none is in {now}; copy '
      'them there, or force it to begin anew.',
      key=key,
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """'key was … and is now …' for each key that a resumed run may not change.

  Args:
    old: the contents of the workdir's config.json.
    new: what would replace them.
  """
  free, decay = {'run', *FREE}, 'config.train.optimizer.decay'
  if not any(_flat(record).get(decay) for record in (old, new)):
    free.add('train.num_steps')  # a constant rate does not depend on it
  return [
    f'{name} was {was!r} and is now {now!r}'
    for name, was, now in _changes(old, new, free)
  ]


def _changes(
  old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str]
) -> list[tuple[str, Any, Any]]:
  """(key, its old value, its new one) where they differ, free keys apart."""
  before, after = _flat(old), _flat(new)
  changed = []
  for key in sorted(before.keys() | after.keys()):
    name = key.removeprefix('config.')
    if name.startswith('data.mixture.'):  # a part's keys are as free
      section, _, key_of_part = name.rpartition('.')
      if section != 'data.mixture' and f'data.{key_of_part}' in free:
        continue
    parts = name.split('.')
    if any('.'.join(parts[:i]) in free for i in range(1, len(parts) + 1)):
      continue
    was, now = before.get(key), after.get(key)
    if was != now:
      changed.append((name, was, now))
  return changed


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if isinstance(tree, dict) and tree:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
      flat |= _flat(value, f'{prefix}{key}.')
    return flat
  return {prefix[:-1]: tree}
