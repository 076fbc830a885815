"""A training directory and the config that its run was started with."""

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from imagen_jax.errors import UsageError
from imagen_jax.io import files
from imagen_jax.io.model_folder import FORMAT_VERSION, load_config

# Keys and sections that may change when a run is resumed: its results do not
# depend on them.
FREE = (
  'mesh',
  'text.path',
  'text.trained_by',
  'data.path',
  'data.max_bad',
  'data.eval_path',
  'stage.sampling',
  'train.log_every',
  'train.checkpoint_every',
  'train.checkpoint_dir',
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


def claim(
  workdir: pathlib.Path,
  config: ConfigDict,
  text: Mapping | None,
  *,
  fingerprint: str | None = None,
  init_from: Mapping[str, str] | None = None,
  force: bool = False,
) -> None:
  """Writes the config into a new workdir, or checks it against the stored one.

  Every process calls it; process 0 writes.

  Args:
    workdir: the directory; it need not exist.
    config: the run's, complete.
    text: `dim`, `max_len` and `digest` of the text encoder, or None.
    fingerprint: of the data set; None if the config determines it.
    init_from: what a new run starts from; a resumed run keeps the stored one.
    force: accept another config or data set, and record it.

  Raises:
    UsageError: the workdir was started with another config, data set or text
      encoder; the message names each key with both values.
  """
  record = {
    'format_version': FORMAT_VERSION,
    'config': json.loads(json.dumps(config.to_dict())),
    'text': text,
    'data': {'fingerprint': fingerprint},
    'init_from': init_from,
  }
  path = workdir / 'config.json'
  if path.exists():
    old = load_config(workdir)
    record['init_from'] = old.get('init_from')
    changed = differences(old, record)
    if changed and not force:
      raise UsageError(
        f'{path} belongs to another run: {"; ".join(changed)}; use another '
        'workdir, repeat the command that started this one, or force it to '
        'resume all the same.',
        key='force',
      )
    for change in changed:
      logging.getLogger(__name__).warning('forced: %s', change)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, record)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """'key was … and is now …' for each key that a resumed run may not change.

  Args:
    old: the contents of the workdir's config.json.
    new: what would replace them.
  """
  before, after = _flat(old), _flat(new)
  free = set(FREE)
  decay = 'config.train.optimizer.decay'
  if not before.get(decay) and not after.get(decay):
    free.add('train.num_steps')  # a constant rate does not depend on it
  changed = []
  for key in sorted(before.keys() | after.keys()):
    name = key.removeprefix('config.')
    parts = name.split('.')
    if any('.'.join(parts[:i]) in free for i in range(1, len(parts) + 1)):
      continue
    was, now = before.get(key), after.get(key)
    if was != now:
      changed.append(f'{name} was {was!r} and is now {now!r}')
  return changed


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if isinstance(tree, dict) and tree:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
      flat |= _flat(value, f'{prefix}{key}.')
    return flat
  return {prefix[:-1]: tree}
