"""Loads configs by name or path, with overrides from the command line.

  --config shapes_base --config.train.num_steps=2000 --config.dtype bfloat16

A config file is Python with a function `get_config(arg='')`. Loading a config
runs its code: load only configs that you trust.
"""

import importlib
import importlib.util
import pathlib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from typing import Any

from imagen_jax.cli.errors import did_you_mean
from imagen_jax.errors import UsageError
from imagen_jax.io.paths import user_path

if typing.TYPE_CHECKING:
  from ml_collections import ConfigDict

_PREFIX = '--config.'


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Separates `--config.key=value` and `--config.key value` from arguments.

  Returns:
    (the other arguments, ['key=value', …]), both in order.

  Raises:
    UsageError: a key has no value.
  """
  rest, overrides = [], []
  words = iter(argv)
  for word in words:
    if not word.startswith(_PREFIX):
      rest.append(word)
      continue
    key, equals, value = word.removeprefix(_PREFIX).partition('=')
    if not equals:
      value = next(words, '--')
      if value.startswith('--'):
        raise UsageError(f'{word} needs a value: {word}=…')
    overrides.append(f'{key}={value}')
  return rest, overrides


def load_config(name: str, overrides: Sequence[str] = ()) -> 'ConfigDict':
  """The complete, locked config of a name or path, with `overrides`.

  Args:
    name: 'shapes_base', 'path/to.py', each optionally followed by ':' and the
      argument for its `get_config`. A name is searched for in `configs/` of the
      current directory, then among the installed configs.
    overrides: strings such as 'train.num_steps=2000'. A value is read as the
      type of its key; None is always allowed.

  Returns:
    an `ml_collections.ConfigDict`; keys that the file does not set have the
    defaults of `configs/common.py`.

  Raises:
    UsageError: there is no such config or key (the message names the nearest),
      a value has the wrong type, or the config file does not run.
  """
  _make_importable()
  from imagen_jax.cli.config_values import complete

  path, arg = _find(name)
  config = complete(_get_config(path, arg), overrides, file=str(path))
  _expand(config)
  return config


def _expand(config: 'ConfigDict') -> None:
  """Names the home directory in every value that begins with ~."""
  for key, value in config.items():
    if hasattr(value, 'items'):
      _expand(value)
    elif isinstance(value, str):
      config[key] = user_path(value)


def _find(name: str) -> tuple[pathlib.Path, str]:
  """(path, arg) of a config."""
  stem, _, arg = name.partition(':')
  if stem.endswith('.py') or '/' in stem:
    path = pathlib.Path(stem)
    if not path.is_file():
      raise UsageError(
        f'there is no config file {path}; check --config'
        + did_you_mean(path.name, (p.name for p in path.parent.glob('*.py')))
      )
    return path, arg
  found = {}
  for directory in reversed(_directories()):
    for path in directory.glob('*.py'):
      if not path.stem.startswith('_') and path.stem != 'common':
        found[path.stem] = path
  if stem not in found:
    raise UsageError(
      f'there is no config named {stem!r}; there are '
      f'{", ".join(sorted(found)) or "none"}' + did_you_mean(stem, found)
    )
  return found[stem], arg


def _directories() -> list[pathlib.Path]:
  """The directories in which names are searched for, in order."""
  package = importlib.import_module('imagen_jax.configs')
  return [pathlib.Path('configs'), *map(pathlib.Path, package.__path__)]


def _make_importable() -> None:
  """Lets a checkout that is not installed import `imagen_jax.configs`."""
  name = 'imagen_jax.configs'
  if name not in sys.modules and importlib.util.find_spec(name) is None:
    package = types.ModuleType(name)
    package.__path__ = [str(pathlib.Path(__file__).parents[2] / 'configs')]
    sys.modules[name] = package


def _get_config(path: pathlib.Path, arg: str) -> Mapping[str, Any]:
  loader = SourceFileLoader(f'config_{path.stem}', str(path))
  module = types.ModuleType(loader.name)
  module.__file__ = str(path)
  try:
    loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise UsageError(f'{path} is no config: it has no get_config().')
    config = module.get_config(arg) if arg else module.get_config()
    if not hasattr(config, 'items'):
      raise UsageError(f'{path} is no config: get_config() gives {config!r}.')
    return config
  except UsageError:
    raise
  except Exception as error:
    raise UsageError(
      f'the config {path} does not run: {type(error).__name__}: {error}'
    ) from error
