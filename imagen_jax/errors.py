"""User errors, one exception per exit code.

Every message is one sentence: what failed, in which file, step or key, the
likely cause, and what to run next. `cli/errors.py` turns these into an exit
code and a single line; library users catch them as exceptions.
"""

from collections.abc import Iterable
from typing import Any


class ImagenError(Exception):
  """An error the user can fix; shown as one sentence, never a traceback."""

  exit_code = 1


class UsageError(ImagenError):
  """A flag, config key or argument is wrong (exit code 2).

  Attributes:
    key: the argument's name, such as 'low_res', or 'config.' and a config key,
      such as 'config.stage.crop'; None where there is none. The command line
      names the flag, --low_res or --config.stage.crop, in its place.
  """

  exit_code = 2

  def __init__(self, message: str, *, key: str | None = None):
    super().__init__(message)
    self.key = key


def check_choice(
  what: str, value: Any, known: Iterable[Any], *, key: str | None = None
) -> None:
  """Raises `UsageError` if `what`, such as a config's key, has no known value.

  Args:
    what: the argument's name, as the message begins.
    value: its value.
    known: all that it may be, for the message.
    key: see `UsageError`.
  """
  known = list(known)
  if value not in known:
    choices = ', '.join(map(str, known))
    raise UsageError(f'{what} is {value!r}; it can be {choices}.', key=key)


class DataError(ImagenError):
  """A data set or image cannot be used (exit code 3)."""

  exit_code = 3


class ModelError(ImagenError):
  """A checkpoint or model folder cannot be used (exit code 4)."""

  exit_code = 4


class NumericError(ImagenError):
  """Training or sampling produced NaN or Inf (exit code 5)."""

  exit_code = 5
