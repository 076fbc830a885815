"""Conditions on images, captions and metadata: which images are used.

  config.data.where = ('side>=512', 'aspect<=2', 'similarity>=0.28')

A condition is a column, a comparison and a number or a word. Some columns are
the image's own, `OWN`; the others are of its metadata.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int8

from imagen_jax.errors import UsageError

_PARTS = re.compile(r'\s*([^\s<>=!]+)\s*(<=|>=|==|!=|<|>)\s*(.*\S)\s*')
_QUOTED = re.compile(r'([\'"])(.*)\1')
_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
  '<': operator.lt,
  '<=': operator.le,
  '>': operator.gt,
  '>=': operator.ge,
  '==': operator.eq,
  '!=': operator.ne,
}
# Of the image in pixels, its shorter side, longer : shorter side; of the
# longest caption, characters and words.
IMAGE = ('width', 'height', 'side', 'aspect')
CAPTION = ('caption_length', 'caption_words')
OWN = IMAGE + CAPTION
KEY = 'config.data.where'
Values: TypeAlias = Sequence[Any] | np.ndarray  # of a column


@dataclasses.dataclass(frozen=True)
class Condition:
  """One condition, such as side>=512.

  Attributes:
    text: as the user wrote it.
    column: what it is about.
    compare: '<', '<=', '>', '>=', '==' or '!='.
    value: a number, or a word for == and !=.
  """

  text: str
  column: str
  compare: str
  value: float | str

  def holds(self, values: Values) -> Bool[np.ndarray, ' n']:
    """Where it holds; it does not where a value is missing."""
    if isinstance(self.value, str):
      words = ['' if v is None else str(v).lower() for v in values]
      same = np.array([word == self.value.lower() for word in words], bool)
      there = np.array([word not in ('', 'nan') for word in words], bool)
      return there & (same if self.compare == '==' else ~same)
    numbers = np.array([*map(_number, values)], float)
    return _COMPARE[self.compare](numbers, self.value) & ~np.isnan(numbers)


def _number(value: Any) -> float:
  """A number, such as one of a CSV file; NaN if it is none."""
  try:
    return float(value)
  except (TypeError, ValueError):
    return np.nan


def parse(texts: Iterable[str] | None) -> tuple[Condition, ...]:
  """The conditions of `data.where`.

  Raises:
    UsageError: one is none.
  """
  found = []
  for text in [texts] if isinstance(texts, str) else texts or ():
    parts = _PARTS.fullmatch(text) if isinstance(text, str) else None
    column, compare, value = parts.groups() if parts else ('', '', '')
    quoted = _QUOTED.fullmatch(value)
    bare = quoted[2] if quoted else value
    number = _number(value)  # "5" is a word
    word = np.isnan(number)
    if not parts or (word and compare not in ('==', '!=')):
      raise UsageError(
        f'data.where has {text!r}; a condition is a column, one of '
        f'{" ".join(_COMPARE)}, and a number (or a word, with == and !=), such '
        'as side>=512 or NSFW==UNLIKELY.',
        key=KEY,
      )
    found.append(Condition(text, column, compare, bare if word else number))
  return tuple(found)


def check_columns(
  conditions: Iterable[Condition], columns: Iterable[str], place: Any
) -> None:
  """Checks that there is every column that conditions name.

  Args:
    conditions: the conditions.
    columns: of the metadata.
    place: the file or the data, for the message.

  Raises:
    UsageError: there is not.
  """
  known = (*OWN, *columns)
  for one in conditions:
    if one.column not in known:
      raise UsageError(
        f'data.where has {one.text!r}, and {place} has no column {one.column}; '
        f'it can be {", ".join(known)}.',
        key=KEY,
      )


def image_columns(sizes: np.ndarray) -> dict[str, np.ndarray]:
  """The columns `IMAGE` of images, from their widths and heights [n, 2]."""
  width, height = np.asarray(sizes, float).reshape(-1, 2).T
  side = np.minimum(width, height)
  aspect = np.maximum(width, height) / np.maximum(side, 1)
  return {'width': width, 'height': height, 'side': side, 'aspect': aspect}


def caption_columns(captions: Sequence[Sequence[str]]) -> dict[str, list[int]]:
  """The columns `CAPTION` of images, from all captions of each."""
  longest = [max(some, key=len, default='') for some in captions]
  return {
    'caption_length': [len(text) for text in longest],
    'caption_words': [len(text.split()) for text in longest],
  }


def first_failure(
  conditions: Sequence[Condition], columns: Mapping[str, Values], n: int
) -> Int8[np.ndarray, ' n']:
  """The number of the first condition that fails for each image; −1: none."""
  failed = np.full(n, -1, np.int8)
  for number, one in reversed([*enumerate(conditions)]):
    failed[~one.holds(columns[one.column])] = number
  return failed


def reason(condition: Condition) -> str:
  """Why an image is left out, as a clause."""
  return f'data.where has {condition.text}'
