"""Paths as users give them: `~`, a model's name, a folder to write to."""

import os
import pathlib

from imagen_jax.errors import UsageError
from imagen_jax.io import bucket
from imagen_jax.io.files import AnyPath

ASSETS = pathlib.Path(__file__).parents[1] / 'assets'  # of bundled models


def user_path(path: AnyPath) -> str:
  """A path with the home directory in place of a leading `~` or `~name`.

  A shell expands `--out ~/images`, but neither `--out=~/images` nor a config.

  Raises:
    UsageError: there is no such home directory.
  """
  try:
    path = os.fspath(path)
    return str(pathlib.Path(path).expanduser()) if path[:1] == '~' else path
  except RuntimeError as error:
    raise UsageError(
      f'{path} names a home directory that does not exist; give the whole '
      'path, or ./~… for a name that begins with ~.'
    ) from error


def located(model: AnyPath | None) -> str:
  """The folder of the model that a user names.

  Args:
    model: a folder; or the name of a bundled model, such as 'demo', unless
      there is a folder of that name; None is the demo.
  """
  if model is None:
    return str(ASSETS / 'demo')
  path = user_path(model)
  known = (folder.parent.name for folder in ASSETS.glob('*/base'))
  if path in known and not os.path.lexists(path):
    return str(ASSETS / path)
  return path


def cache_folder() -> pathlib.Path | None:
  """Our part of the user's cache directory, created; None if there is none."""
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  folder = pathlib.Path(base) / 'imagen_jax'
  if not folder.is_absolute():  # no HOME, and an unknown user
    return None
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return None
  return folder


def check_folder(
  path: AnyPath, *, key: str | None = None, in_bucket: bool = False
) -> pathlib.Path:
  """The folder at `path`, which exists or can be made; nothing is left there.

  A command calls it first, so that no work is lost at the end.

  Args:
    path: of a folder that will be written to.
    key: of the argument, for the error.
    in_bucket: whether it may be in a bucket.

  Raises:
    UsageError: there is something else, or files cannot be written there.
  """
  if bucket.is_bucket(path):
    if not in_bucket:
      raise UsageError(
        f'{path} is in a bucket; give a local folder and copy it there.',
        key=key,
      )
    bucket.check(os.fspath(path), key=key)
    return bucket.at(path)
  folder, problem = bucket.at(path, key=key), ''
  try:
    folder.stat()
  except FileNotFoundError:
    pass
  except (OSError, ValueError) as error:  # ValueError: a null byte
    reason = getattr(error, 'strerror', error)
    problem = f'it cannot be a directory ({reason})'
  if not problem:
    there = next(
      p for p in (folder, *folder.absolute().parents) if os.path.lexists(p)
    )
    if not there.is_dir():
      problem = f'{there} is not a directory'
    elif not os.access(there, os.W_OK | os.X_OK):
      problem = f'permission is denied at {there}'
  if problem:
    raise UsageError(f'{path}: {problem}; give another directory.', key=key)
  return folder
