"""Checks of the settings that are compiled in."""

from collections.abc import Iterable

UNIT = 'it lies in [0, 1].'


class SettingError(ValueError):
  """A field of a spec has an invalid value.

  Attributes:
    field: its name; the message starts with it.
  """

  def __init__(self, field: str, value: object, rule: str):
    super().__init__(f'{field} is {value!r}; {rule}')
    self.field = field


def check(spec: object, *rules: tuple[str, bool, str]) -> None:
  """Raises a `SettingError` for the first (field, valid, rule) not valid."""
  for field, valid, rule in rules:
    if not valid:
      raise SettingError(field, getattr(spec, field), rule)


def one_of(choices: Iterable[str | None]) -> str:
  """The rule of a field with named values."""
  return f'choose one of {", ".join(str(name).lower() for name in choices)}.'
