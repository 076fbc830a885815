"""Where the text encoder of a config, or of a model folder's stage, lies."""

import pathlib
from collections.abc import Iterator

from imagen_jax.errors import ModelError
from imagen_jax.io import bucket, encoder_package
from imagen_jax.io.files import AnyPath
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.io.paths import ASSETS


def find(configured: AnyPath) -> pathlib.Path:
  """The folder of weights that a config's `text.path` names.

  Args:
    configured: 'demo' for the bundled encoder, the name of one that a package
      ships ('all-minilm-l6-v2'), a folder in Hugging Face layout, or the
      workdir of a finished pretraining, which has an `export`.

  Returns:
    the folder, which need not exist.

  Raises:
    ModelError: it is in a package that is damaged.
  """
  if configured == 'demo':
    return ASSETS / 'demo' / 'text'
  path = pathlib.Path(configured)
  if str(configured) in encoder_package.PACKAGES and not path.exists():
    return encoder_package.folder(str(configured)) or path
  exported = path / 'export'
  return exported if (exported / 'config.json').exists() else path


def existing(
  configured: AnyPath, trained_by: str | None = None
) -> pathlib.Path:
  """`find`, which holds the config of an encoder.

  Args:
    configured: see `find`.
    trained_by: the name of the config that pretrains it; None if none does.

  Raises:
    ModelError: there is no encoder; the message names how to get it.
  """
  folder = find(configured)
  # A pretraining has a config.json too, and an `export` when it has finished.
  unfinished = (folder / 'checkpoints').exists()
  if (folder / 'config.json').exists() and not unfinished:
    return folder
  get = f'download an encoder, such as google/t5-v1_1-large, to {folder}'
  if str(configured) in encoder_package.PACKAGES:
    get = encoder_package.advice(str(configured))
  elif trained_by is not None:
    get = f'run `python train.py --config {trained_by} --workdir {folder}`'
  raise ModelError(
    f'there is no {"finished " * unfinished}text encoder at {str(configured)!r}'
    f' (text.path): {get}, or set text.path=demo for the bundled one, whose '
    "vocabulary is that of the demo's captions."
  )


def of_stage(path: AnyPath, record: StageRecord) -> pathlib.Path:
  """The folder of a stage's text encoder.

  A folder `text` beside the stage takes precedence over the path in the stage's
  config, which may be another machine's.

  Raises:
    ModelError: there is none.
  """
  if folder := found(path, record):
    return folder
  candidates = dict.fromkeys(map(str, _candidates(path, record)))
  get = 'put it in the first of them'
  if (name := record.config['text']['path']) in encoder_package.PACKAGES:
    get = encoder_package.advice(name)
  raise ModelError(
    f'the text encoder of stage {record.name} is not in '
    f'{" or ".join(candidates)}; {get}.'
  )


def found(path: AnyPath, record: StageRecord) -> pathlib.Path | None:
  """`of_stage`, None if there is none."""
  folders = (c for c in _candidates(path, record) if c.is_dir())
  return next(map(find, folders), None)


def _candidates(path: AnyPath, record: StageRecord) -> Iterator[pathlib.Path]:
  for folder in bucket.at(path), record.path.parent:
    if not bucket.is_bucket(folder):  # an encoder is read from a local folder
      yield folder / 'text'
  if configured := record.config['text']['path']:
    yield find(configured)
