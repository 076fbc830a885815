"""Resolves a config's `kind` to a class; suggests names."""

import difflib
import importlib
from collections.abc import Iterable, Mapping

from imagen_jax.errors import UsageError


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """'; did you mean X?' for the nearest of `known`, or '.' if none is."""
  near = difflib.get_close_matches(name, list(known), n=1)
  return f'; did you mean {near[0]}?' if near else '.'


def find(kind: str, table: Mapping[str, str], *, key: str, base: type) -> type:
  """The class of a kind, imported on demand.

  Args:
    kind: a name in the table, or 'my_module:MyClass' of the user's own.
    table: {name: 'package.module:Class'}.
    key: what holds `kind`, as in `UsageError`.
    base: the class must derive from this.

  Raises:
    UsageError: no such name, module or class, or a class of another base.
  """
  where = key.removeprefix('config.')
  if kind not in table and ':' not in str(kind):
    raise UsageError(
      f'{where} is {kind!r}; it can be {", ".join(table)}, or a class of yours '
      'as my_module:MyClass' + did_you_mean(str(kind), table),
      key=key,
    )
  module_name, _, name = table.get(kind, kind).partition(':')
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    # The missing module may be one that it imports in turn.
    raise UsageError(
      f'{where} is {kind!r}, and {error.name} cannot be imported; install it, '
      'or run the command where Python finds it (PYTHONPATH).',
      key=key,
    ) from error
  cls = getattr(module, name, None)
  if not (isinstance(cls, type) and issubclass(cls, base)):
    raise UsageError(
      f'{where} is {kind!r}, and {module_name} has no class {name!r} that '
      f'derives from {base.__module__}.{base.__qualname__}.',
      key=key,
    )
  return cls
