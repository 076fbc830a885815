"""Config files by name or path, and changes to them from the command line.

  --config shapes_base --config.train.num_steps=2000 --config.dtype bfloat16

A config file is Python with a function `get_config(arg='')`, and loading it
runs it: run only those you trust.
"""

import ast
import importlib.util
import pathlib

from imagen_jax.cli.errors import did_you_mean
from imagen_jax.errors import UsageError

_PREFIX = '--config.'
_BOOLS = {'true': True, 'false': False, '1': True, '0': False}


def split_overrides(argv):
  """Takes `--config.key=value` and `--config.key value` out of arguments.

  Returns:
    (the other arguments, ['key=value', …]), both in order.

  Raises:
    UsageError: a key has no value.
  """
  rest, overrides = [], []
  argv = iter(argv)
  for word in argv:
    if not word.startswith(_PREFIX):
      rest.append(word)
      continue
    key, equals, value = word.removeprefix(_PREFIX).partition('=')
    if not equals:
      value = next(argv, '--')
      if value.startswith('--'):
        raise UsageError(f'{word} needs a value: {word}=…')
    overrides.append(f'{key}={value}')
  return rest, overrides


def load_config(name, overrides=()):
  """The config of a name or path, with `overrides` applied, locked.

  Args:
    name: 'shapes_base', 'path/to.py', each optionally followed by ':' and the
      argument for its `get_config`. A name is looked for in `configs/` of the
      current directory, then among the installed ones.
    overrides: strings such as 'train.num_steps=2000'. A value is read as the
      type of the one it replaces; None is always allowed.

  Returns:
    an `ml_collections.ConfigDict`.

  Raises:
    UsageError: no such config or key (naming the nearest), a value of another
      type, or a config file that does not run.
  """
  import ml_collections

  path, arg = _find(name)
  config = _get_config(path, arg)
  if not isinstance(config, ml_collections.ConfigDict):
    config = ml_collections.ConfigDict(config)
  # An empty section takes any key: it stands for a function's options.
  open_sections = {k for k, v in _flat(config).items() if _is_section(v)}
  with config.unlocked():
    for override in overrides:
      _apply(config, override, open_sections)
  return config.lock()


def _find(name):
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
      if not path.stem.startswith('_'):
        found[path.stem] = path
  if stem not in found:
    raise UsageError(
      f'there is no config named {stem!r}; there are '
      f'{", ".join(sorted(found)) or "none"}' + did_you_mean(stem, found)
    )
  return found[stem], arg


def _directories():
  """Where names are looked for, the first first."""
  directories = [pathlib.Path('configs')]
  try:
    spec = importlib.util.find_spec('imagen_jax.configs')
  except ModuleNotFoundError:
    spec = None
  if spec is not None:
    directories += map(pathlib.Path, spec.submodule_search_locations)
  # A checkout that is run without being installed.
  directories.append(pathlib.Path(__file__).parents[2] / 'configs')
  return directories


def _get_config(path, arg):
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise UsageError(f'{path} is no config: it has no get_config().')
    return module.get_config(arg) if arg else module.get_config()
  except UsageError:
    raise
  except Exception as error:
    raise UsageError(
      f'the config {path} does not run: {type(error).__name__}: {error}'
    ) from error


def _apply(config, override, open_sections):
  key, equals, text = override.partition('=')
  if not equals:
    raise UsageError(f'{override!r} changes nothing: write key=value.')
  *sections, last = key.split('.')
  parent = config
  for section in sections:
    if section not in parent or not _is_section(parent[section]):
      raise _unknown(config, key)
    parent = parent[section]
  if '.'.join(sections) in open_sections:
    parent[last] = _literal(text)
    return
  if last not in parent:
    raise _unknown(config, key)
  old = parent[last]
  if _is_section(old):
    raise UsageError(
      f'config.{key} is a section; set one of its keys: '
      f'{", ".join(f"{key}.{k}" for k in old) or "it has none yet"}.'
    )
  with config.ignore_type():
    parent[last] = _parse(key, text, old)


def _parse(key, text, old):
  """`text` as a value of the type of `old`."""
  if text in ('None', 'none'):
    return None
  try:
    if isinstance(old, bool):
      return _BOOLS[text.lower()]
    if isinstance(old, int):
      return _integer(text)
    if isinstance(old, float):
      return float(text)
    if isinstance(old, str):
      return text
    if isinstance(old, tuple | list):
      value = _literal(text)
      value = value if isinstance(value, tuple | list) else (value,)
      if old and all(type(x) is type(old[0]) for x in old):
        value = [_parse(key, str(x), old[0]) for x in value]
      return type(old)(value)
  except (KeyError, ValueError) as error:
    kind = {bool: 'true or false', int: 'a whole number', float: 'a number'}
    raise UsageError(
      f'config.{key} cannot be {text!r}: it is '
      f'{kind.get(type(old), f"a {type(old).__name__}")}, such as {old!r}.'
    ) from error
  return _literal(text)


def _integer(text):
  """2000, 2_000 or 2e3."""
  try:
    return int(text)
  except ValueError:
    value = float(text)
    if not value.is_integer():
      raise
    return int(value)


def _literal(text):
  """A value whose type nothing prescribes: a Python literal, else a string."""
  if text.lower() in ('true', 'false'):
    return _BOOLS[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _unknown(config, key):
  known = _flat(config)
  # A right name without its section is nearer than any spelling.
  ends = [k for k in known if k.split('.')[-1] == key.split('.')[-1]]
  return UsageError(
    f'the config has no key {key!r}'
    + (f'; did you mean {ends[0]}?' if ends else did_you_mean(key, known))
  )


def _is_section(value):
  return hasattr(value, 'items')


def _flat(config, prefix=''):
  """{'train.num_steps': 2000, …}; an empty section is a leaf."""
  flat = {}
  for key, value in config.items():
    if _is_section(value) and len(value):
      flat.update(_flat(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat
