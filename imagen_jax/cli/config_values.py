"""Completes a config: defaults, then a file, then the command line."""

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from imagen_jax.cli.errors import did_you_mean
from imagen_jax.configs import common
from imagen_jax.errors import UsageError

_BOOLS = {'true': True, 'false': False, '1': True, '0': False}
TYPES = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a string',
  tuple: 'a tuple',
}


def complete(
  given: Mapping[str, Any], overrides: Sequence[str] = (), *, file: str
) -> ConfigDict:
  """The defaults, overridden by a config file, then by the command line.

  Args:
    given: what the file's `get_config` returned; it may lack keys.
    overrides: strings such as 'train.num_steps=2000'.
    file: its name, for messages.

  Returns:
    a locked ConfigDict with every key of `configs/common.py`.

  Raises:
    UsageError: a key is unknown (the message names the nearest), or a value
      has the wrong type or is out of range (the message names what is right).
  """
  changes = [_split(override) for override in overrides]
  last = dict(changes)
  kind = str(last.get('kind', given.get('kind', 'stage')))
  data: Any = given.get('data')
  source = data.get('kind', '') if _is_section(data) else ''
  config = common.template(kind)
  if ':' in kind and 'stage' in given:
    config.stage = common.stage()
  keys = _Keys(
    _flat(config),
    _flat(config, of=ConfigDict.get_type),
    own_kind=':' in kind,
    own_source=':' in str(last.get('data.kind', source)),
  )
  with config.unlocked(), config.ignore_type():
    try:
      _merge(config, given, '', keys, file)
    except ValueError as error:  # a name with a dot, in a section of any names
      raise UsageError(f'{file}: {error}') from error
    for key, text in changes:
      _override(config, key, text, keys)
  for key, value in _flat(config).items():
    where, plain = '' if key in last else file, _plain(key)
    if plain != key and plain in keys.types:
      keys.checked(key, value, where, of=plain)
    _check_range(key, value, keys, where)
  return config.lock()


def _error(key: str, problem: str, file: str = '') -> UsageError:
  """The error of a key in a config file or, without one, in an override."""
  if file:
    return UsageError(f'{file}: {key} {problem}')
  return UsageError(f'{key} {problem}', key=f'config.{key}')


@dataclasses.dataclass(frozen=True)
class _Keys:
  """The keys that a config may have.

  Attributes:
    known: keys and defaults of `common`, {'train.num_steps': 100_000, …}.
    types: of their values, of those that may be None too.
    own_kind: whether the experiment is a class of the user's.
    own_source: whether the data source is a class of the user's.
  """

  known: Mapping[str, Any]
  types: Mapping[str, type]
  own_kind: bool
  own_source: bool

  def is_open(self, section: str) -> bool:
    """Whether a section takes keys that are not listed."""
    top = section.partition('.')[0]
    return (
      any(f'{section}.'.startswith(f'{name}.') for name in common.OPEN)
      or (self.own_source and top == 'data')
      or (self.own_kind and top not in ('train', 'mesh'))
    )

  def nullable(self, key: str) -> bool:
    """Whether a key may be None."""
    return self.known.get(key) is None or key in common.NULLABLE

  def checked(
    self, key: str, value: Any, file: str = '', *, of: str | None = None
  ) -> Any:
    """A value as its key's type; int is accepted for float, list for tuple.

    Args:
      key: its name.
      value: what it is set to.
      file: see `_error`.
      of: the known key that has the type; None: `key` itself.
    """
    kind = self.types[of or key]
    if kind is float and type(value) is int:
      return float(value)
    if kind is tuple and isinstance(value, list):
      return tuple(value)
    if self.nullable(of or key) if value is None else type(value) is kind:
      return value
    wanted = TYPES.get(kind, 'None')
    raise _error(key, f'is {value!r}; it must be {wanted}.', file)

  def parse(self, key: str, text: str) -> Any:
    """A string of the command line as its key's type."""
    kind = self.types[key]
    try:
      if text in ('None', 'none') and self.nullable(key):
        return None
      if kind is bool:
        return _BOOLS[text.lower()]
      if kind is int:
        return _integer(text)
      if kind in (float, str):
        return kind(text)
    except (KeyError, ValueError, OverflowError) as error:
      raise _error(key, f'is {text!r}; it must be {TYPES[kind]}.') from error
    return self.checked(key, _literal(text))

  def unknown(self, key: str, file: str = '') -> UsageError:
    """The error for a key that is not listed."""
    # A key of that name in another section is nearer than any spelling.
    last = key.split('.')[-1]
    ends = [k for k in self.known if k.split('.')[-1] == last]
    near = did_you_mean(ends[0] if ends else key, self.known)
    return _error(key, f'is no key of a config{near}', file)


def _plain(key: str) -> str:
  """The key that describes another: data.max_bad that of a mixture's part."""
  return re.sub(r'^data\.mixture\.[^.]+\.', 'data.', key)


def _split(override: str) -> tuple[str, str]:
  key, equals, text = override.partition('=')
  if not equals:
    raise UsageError(f'{override!r} has no value; write key=value.')
  return key, text


def _merge(
  config: ConfigDict,
  given: Mapping[str, Any],
  section: str,
  keys: _Keys,
  file: str,
) -> None:
  """Merges a file's values into one section of the config, in place."""
  for key, value in given.items():
    name = f'{section}.{key}' if section else str(key)
    if key not in config:
      if not keys.is_open(section):
        raise keys.unknown(name, file)
      config[key] = value
    elif _is_section(config[key]) and _is_section(value):
      _merge(config[key], value, name, keys, file)
    elif _is_section(value) and keys.is_open(name):
      config[key] = value
    elif _is_section(config[key]):
      raise _error(name, f'is a section, not {value!r}.', file)
    else:
      config[key] = keys.checked(name, value, file)


def _override(config: ConfigDict, key: str, text: str, keys: _Keys) -> None:
  """Sets one value of the command line in the config, in place."""
  section, _, last = key.rpartition('.')
  parent = config
  for part in section.split('.') if section else ():
    if part not in parent or not _is_section(parent[part]):
      raise keys.unknown(key)
    parent = parent[part]
  free = keys.is_open(section)
  if last not in parent and not free:
    raise keys.unknown(key)
  old = parent.get(last)
  if _is_section(old) and text == 'None' and keys.known.get(key, 0) is None:
    parent[last] = None
  elif _is_section(old):
    inside = ', '.join(f'{key}.{k}' for k in old) or 'it has none yet'
    raise _error(key, f'is a section; set one of its keys: {inside}.')
  elif free and key not in keys.known:
    value = text if isinstance(old, str) else _literal(text)
    one = isinstance(old, tuple) and not isinstance(value, tuple)
    parent[last] = (value,) if one else value
  else:
    parent[last] = keys.parse(key, text)


def _integer(text: str) -> int:
  """An integer written as 2000, 2_000 or 2e3."""
  try:
    return int(text)
  except ValueError:
    value = float(text)
    if not value.is_integer():
      raise
    return int(value)


def _literal(text: str) -> Any:
  """The value of a key without a type: a Python literal, else a string."""
  if text.lower() in ('true', 'false', 'none'):
    return _BOOLS.get(text.lower())
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    numbers = 'nan', 'inf', 'infinity'
    return float(text) if text.lower().lstrip('+-') in numbers else text


def _is_section(value: Any) -> bool:
  return hasattr(value, 'items')


def _check_range(key: str, value: Any, keys: _Keys, file: str) -> None:
  """Refuses a number that is out of range, alone or in a tuple."""
  if isinstance(value, (tuple, list)):
    for part in value:
      if key in common.RANGES and not isinstance(part, (int, float)):
        raise _error(key, f'has {part!r}; it must be {TYPES[float]}.', file)
      _check_range(key, part, keys, file)
  interval = common.RANGES.get(_plain(key), '(-inf, inf)')
  if not isinstance(value, (int, float)):
    free = value is None and key in common.NULLABLE
    if key in common.RANGES and key not in keys.known and not free:
      raise _error(key, f'is {value!r}; it must be in {interval}.', file)
    return
  if type(value) is int and key in keys.known:
    interval = interval.replace('(-inf', f'[{-(2**31)}')
    interval = interval.replace('inf)', f'{2**31 - 1}]')
  low, high = map(float, interval[1:-1].split(','))
  if not (
    low < value < high
    or (value == low and interval.startswith('['))
    or (value == high and interval.endswith(']'))
  ):
    raise _error(key, f'is {value!r}; it must be in {interval}.', file)


def _flat(
  config: ConfigDict,
  prefix: str = '',
  *,
  of: Callable[[ConfigDict, str], Any] = ConfigDict.__getitem__,
) -> dict[str, Any]:
  """{'train.num_steps': 2000, …}; an empty section is a leaf."""
  flat = {}
  for key, value in config.items():
    if _is_section(value) and len(value):
      flat.update(_flat(value, f'{prefix}{key}.', of=of))
    else:
      flat[prefix + key] = of(config, key)
  return flat
