"""Paths in a bucket, such as gs://my-bucket/runs/base, through fsspec.

An object is written whole or not at all, a listing shows what exists, and
there are no folders: a prefix without objects does not exist.
"""

import functools
import os
import pathlib
import secrets
from typing import Any

from imagen_jax.errors import ImagenError, UsageError

NO_LOGIN = 'no credentials were found, or they are not valid'
DENIED = 'permission is denied'
QUOTA = 'the quota of requests is used up'
UNREACHABLE = 'the server cannot be reached'
PASSING = (QUOTA, UNREACHABLE)  # another attempt may succeed
_CODES = {401: NO_LOGIN, 403: DENIED, 429: QUOTA}
# {in an error's type or text: what it means}
_WORDS = {
  'DefaultCredentialsError': NO_LOGIN,
  'RefreshError': NO_LOGIN,
  'UNAUTHENTICATED': NO_LOGIN,
  'response code: 401': NO_LOGIN,
  'Forbidden': DENIED,
  'PERMISSION_DENIED': DENIED,
  'AccessDenied': DENIED,
  'response code: 403': DENIED,
  'response code: 429': QUOTA,
  'ClientConnector': UNREACHABLE,
  'ServerDisconnected': UNREACHABLE,
}


def is_bucket(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL such as gs://bucket/folder."""
  return '://' in os.fspath(path)


def at(path: str | os.PathLike[str], *, key: str | None = None) -> pathlib.Path:
  """A `pathlib.Path`, or in a bucket an `epath.Path`, which has its methods.

  Raises:
    UsageError: the kind of bucket is unknown, or its library not installed.
  """
  text = os.fspath(path)
  if not is_bucket(text):
    if ':/' in text and text.split(':/')[0] in ('gs', 's3'):
      # pathlib makes gs:/ of gs://, which would be a folder of that name.
      raise UsageError(
        f'{text} is no path; a bucket is gs://BUCKET/FOLDER.', key=key
      )
    return pathlib.Path(text)
  filesystem(text, key=key)
  from etils import epath

  return epath.Path(text)


def filesystem(path: str | os.PathLike[str], *, key: str | None = None) -> Any:
  """The fsspec file system of a bucket's path; its listings are not cached.

  Raises:
    UsageError: as `at`.
  """
  scheme, _, rest = os.fspath(path).partition('://')
  if not rest.strip('/') or '//' in rest:
    raise UsageError(
      f'{path} is no path; a bucket is gs://BUCKET/FOLDER.', key=key
    )
  try:
    return _filesystem(scheme)
  except (ImportError, ValueError) as error:
    extra = " with pip install 'imagen_jax[gcs]'" if scheme == 'gs' else ''
    raise UsageError(
      f'{path} cannot be opened ({error}); install what it needs{extra}, or '
      'give a local path.',
      key=key,
    ) from error


@functools.cache
def _filesystem(scheme: str) -> Any:
  import fsspec

  # For every instance, Orbax's too: its Path takes TensorFlow where that is
  # installed, and a cached listing hides what other processes have written.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  kind = fsspec.get_filesystem_class(scheme)
  names = [kind.protocol] if isinstance(kind.protocol, str) else kind.protocol
  for name in names:
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
  return fsspec.filesystem(scheme)


def reason(error: BaseException) -> str | None:
  """What an error of a bucket means, in words; None if it is another."""
  text, code = f'{type(error).__name__}: {error}', getattr(error, 'code', None)
  words = (said for part, said in _WORDS.items() if part in text)
  return _CODES.get(code) if code in _CODES else next(words, None)


def kind_of(
  error: BaseException, lasting: type[ImagenError]
) -> type[ImagenError]:
  """`lasting`, or `ImagenError` for what another attempt may not meet again.

  Its exit code is one that a supervisor restarts after.
  """
  return ImagenError if reason(error) in PASSING else lasting


def check(path: str, *, key: str | None = None) -> None:
  """Writes and removes an object, so that no work is lost later.

  Raises:
    UsageError: there is no such bucket, no permission, or no credentials.
    ImagenError: the server does not answer now.
  """
  where = f'{path.rstrip("/")}/.{secrets.token_hex(8)}.probe'
  system = filesystem(path, key=key)
  bucket = path.split('://')[1].split('/')[0]
  try:
    system.pipe_file(where, b'imagen_jax')
    system.rm_file(where)
  except FileNotFoundError as error:
    raise UsageError(
      f'{path}: there is no bucket {bucket}; check its name, or create it.',
      key=key,
    ) from error
  except Exception as error:
    problem = reason(error)
    if problem is None and not isinstance(error, OSError):
      raise
    if problem in PASSING:
      raise ImagenError(
        f'{path} cannot be written now ({problem}); run the same command again.'
      ) from error
    raise UsageError(
      f'{path} cannot be written ({problem or error}); log in with `gcloud '
      'auth application-default login`, or let the account of this machine '
      f'read, list, write and delete objects of {bucket} '
      '(roles/storage.objectAdmin).',
      key=key,
    ) from error
