"""A suite: what is generated, and how the images are scored.

To add one, derive from `Suite` and return it from your data source's
`suite(config)`; `--suite my_module:MySource` then evaluates it.
"""

import abc
import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from imagen_jax.errors import UsageError, check_choice
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.scores import Categories

Record = dict[str, typing.Any]  # of one finished image
Records = Mapping[tuple[str, int], Record]  # by (category, number)


@dataclasses.dataclass(frozen=True)
class Item:
  """One image to generate.

  Attributes:
    category: of the prompt, one level of grouping.
    number: of the image within its category.
    prompt: what to generate.
    index: which image of this prompt, see `Cascade.sample`.
  """

  category: str
  number: int
  prompt: str
  index: int = 0

  @property
  def file(self) -> str:
    """Its PNG, relative to the run's folder."""
    return f'images/{slug(self.category)}/{self.number:05d}.png'


class Suite(abc.ABC):
  """What is generated and how it is scored.

  Attributes:
    uses: suite-specific fields of `EvalConfig` that the suite reads; setting
      any other is an error.
    controls: categories that are controls, not scores of the model; grey in
      the report.
    reference: the entry of `score` with the judge's accuracy on true images,
      marked beside each score in the report; None if there is none.
  """

  uses: typing.ClassVar[tuple[str, ...]] = ()
  controls: typing.ClassVar[tuple[str, ...]] = ()

  @property
  @abc.abstractmethod
  def label(self) -> str:
    """Its name in `scores.json`, and of its folder."""

  @property
  def reference(self) -> str | None:
    return None

  @abc.abstractmethod
  def heading(self) -> tuple[str, str]:
    """Title and description of its section in the report."""

  @abc.abstractmethod
  def items(self) -> list[Item]:
    """Every image of a run, in the same order in all processes."""

  @abc.abstractmethod
  def digest(self) -> str:
    """16 hex digits that identify the prompts."""

  @abc.abstractmethod
  def score(
    self, folder: pathlib.Path, records: Records
  ) -> dict[str, Categories]:
    """{entry: {category: score}} of a finished run; `label` is one entry."""

  def judge(self, item: Item, image: UInt8[np.ndarray, 'h w 3']) -> Record:
    """Further fields of an image's record.

    The report shows 'correct' (a boolean) and 'aspects' ({name: True, False or
    None}).
    """
    return {}

  def true_image(self, item: Item, size: int) -> UInt8[np.ndarray, 's s 3']:
    """The image that a perfect model would generate; for `from_truth`."""
    raise NotImplementedError

  def confusions(self, records: Records) -> dict[str, dict[str, dict]]:
    """{aspect: {prompted: {seen: count}}}, tables of the report."""
    return {}

  def provenance(self) -> dict[str, typing.Any]:
    """What the scores depend on, for `scores.json`."""
    return {}

  def notes(self, resolution: int) -> list[str]:
    """Caveats on scores at this resolution."""
    return []


def check_uses(suite: Suite, config: EvalConfig) -> None:
  """Checks that no option of another suite is set.

  Raises:
    UsageError: an option would have no effect.
  """
  ours = ('num', 'categories', 'from_truth', 'prompts', 'num_images', 'data')
  networks = ('inception', 'fid_mode', 'efficientnet', 'clip')
  for key in (*ours, 'source', *networks):
    given = getattr(config, key) != getattr(EvalConfig, key)
    if given and key not in suite.uses:
      raise UsageError(
        f'{key} has no effect with suite {suite.label}, which takes '
        f'{", ".join(suite.uses) or "no options"}; leave it out.',
        key=key,
      )


def number(prompts: Iterable[tuple[str, str]]) -> list[Item]:
  """The items of (category, prompt) pairs.

  A prompt repeated in its category gets another image of that prompt.
  """
  numbers: dict[str, int] = collections.Counter()
  seen: dict[tuple[str, str], int] = collections.Counter()
  items = []
  for category, prompt in prompts:
    item = Item(category, numbers[category], prompt, seen[category, prompt])
    items.append(item)
    numbers[category] += 1
    seen[category, prompt] += 1
  return items


def choose(
  categories: Sequence[str] | None, known: Iterable[str]
) -> tuple[str, ...]:
  """The categories of a config in the suite's order; None is all of them.

  Raises:
    UsageError: one of them is unknown.
  """
  known = tuple(dict.fromkeys(known))
  for name in categories or ():
    check_choice('a name in categories', name, known, key='categories')
  return tuple(x for x in known if categories is None or x in categories)


def digest(value: typing.Any) -> str:
  """16 hex digits that identify a JSON value."""
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def slug(text: str) -> str:
  """A name as part of a path: letters, digits and = , . - only."""
  return re.sub(r'[^A-Za-z0-9=,.]+', '-', text).strip('-.') or 'other'
