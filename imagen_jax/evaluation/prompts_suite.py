"""Suite prompts: images of a user's prompts, for inspection."""

import collections
import dataclasses
import pathlib
import typing

from imagen_jax.errors import UsageError
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.prompts import read_prompts
from imagen_jax.evaluation.scores import Categories
from imagen_jax.evaluation.suite import (
  Item,
  Records,
  Suite,
  choose,
  digest,
  number,
)


@dataclasses.dataclass(frozen=True)
class Prompts(Suite):
  """Images of a list of prompts; the score is only their number.

  Attributes:
    listed: ((category, prompt), …).
    num_images: per prompt.
  """

  listed: tuple[tuple[str, str], ...]
  num_images: int
  label = 'prompts'
  uses: typing.ClassVar[tuple[str, ...]] = (
    'num',
    'categories',
    'prompts',
    'num_images',
  )

  @classmethod
  def from_config(cls, config: EvalConfig, resolution: int) -> 'Prompts':
    return cls(_listed(config), config.num_images)

  def heading(self) -> tuple[str, str]:
    return 'Images of prompts', 'By category, the first of each.'

  def items(self) -> list[Item]:
    return number(x for x in self.listed for _ in range(self.num_images))

  def digest(self) -> str:
    return digest([self.listed, self.num_images])

  def score(
    self, folder: pathlib.Path, records: Records
  ) -> dict[str, Categories]:
    counts = collections.Counter(category for category, _ in records)
    return {self.label: {name: {'n': n} for name, n in counts.items()}}

  def provenance(self) -> dict[str, typing.Any]:
    return {'num': len(self.listed)}


def _listed(config: EvalConfig) -> tuple[tuple[str, str], ...]:
  """The first `num` prompts of each of the categories.

  Raises:
    UsageError, DataError: no file, an unknown category, or an unreadable file.
  """
  if not config.prompts:
    raise UsageError(
      f'prompts is not set; suite {config.suite} needs a file of them: '
      'DrawBench .csv, PartiPrompts .tsv, GenEval .jsonl, or .txt with one '
      'prompt a line.',
      key='prompts',
    )
  listed = read_prompts(config.prompts)
  return tuple(
    prompt
    for name in choose(config.categories, (category for category, _ in listed))
    for prompt in [x for x in listed if x[0] == name][: config.num]
  )
