"""A training directory and the config it was started with."""

import json
import logging

from imagen_jax.errors import UsageError
from imagen_jax.io import files
from imagen_jax.io.model_folder import FORMAT_VERSION

# What may change between two starts of one run: it does not change the
# numbers that the run computes.
FREE = (
  'mesh.',
  'text.path',
  'data.path',
  'data.max_bad',
  'data.eval_path',
  'stage.sampling.',
  'train.log_every',
  'train.checkpoint_every',
  'train.checkpoint_dir',
  'train.sample_every',
  'train.keep_last',
  'train.keep_every',
  'train.max_bad_steps',
  'train.hang_seconds',
  'train.eval_every',
  'train.profile_at',
  'train.log_to',
)
# What a config that does not say it has always meant.
DEFAULTS = {
  'data.flip': False,
  'data.resize': 'area',
  'stage.max_level': 1.0,
  'text.dtype': 'float32',
  'train.accumulate': 1,
}


def claim(
  workdir,
  config,
  encoder,
  *,
  fingerprint=None,
  init_from=None,
  force=False,
  write=True,
):
  """Writes the config into a new workdir, or checks it against an old one's.

  Args:
    workdir: `pathlib.Path`.
    config: the run's ConfigDict.
    encoder: the text encoder; its width and digest are recorded.
    fingerprint: of the data set; None where the config says it all.
    init_from: what the run starts from, a plain dict; kept with a new run.
    force: continue with another config or data set; it is written down.
    write: whether this process writes.

  Raises:
    UsageError: the workdir was started with another config, data set or text
      encoder; the sentence names each key with both values.
  """
  record = {
    'format_version': FORMAT_VERSION,
    'config': json.loads(json.dumps(config.to_dict())),
    'text': {
      'dim': encoder.dim,
      'max_len': config.text.max_len,
      'digest': encoder.digest,
    },
    'data': {'fingerprint': fingerprint},
    'init_from': init_from,
  }
  path = workdir / 'config.json'
  if path.exists():
    old = files.read_json(path, version=FORMAT_VERSION)
    record['init_from'] = old.get('init_from')
    changed = differences(old, record)
    if changed and not force:
      raise UsageError(
        f'{path} belongs to another run: {"; ".join(changed)}; use another '
        '--workdir, or repeat the command that started this one (--force '
        'continues all the same).'
      )
    for change in changed:
      logging.getLogger(__name__).warning('--force: %s', change)
  if write:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, record)


def differences(old, new):
  """'key: old, now new' for every key that a resumed run may not change."""
  before, after = _flat(old), _flat(new)
  if 'data.fingerprint' not in before:  # written before there was one
    after.pop('data.fingerprint', None)
  free = FREE
  decays = after.get('config.train.optimizer.decay')
  if not decays and decays == before.get('config.train.optimizer.decay'):
    free = (*FREE, 'train.num_steps')
  changed = []
  for key in sorted(before.keys() | after.keys()):
    name = key.removeprefix('config.')
    if any(name == f or (f.endswith('.') and name.startswith(f)) for f in free):
      continue
    default = DEFAULTS.get(name)
    if before.get(key, default) != after.get(key, default):
      changed.append(
        f'{name} was {before.get(key)!r} and is now {after.get(key)!r}'
      )
  return changed


def _flat(tree, prefix=''):
  if isinstance(tree, dict) and tree:
    flat = {}
    for key, value in tree.items():
      flat.update(_flat(value, f'{prefix}{key}.'))
    return flat
  return {prefix[:-1]: tree}
