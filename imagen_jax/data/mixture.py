"""Several sources as one, each with its fraction of every batch.

  config.data.kind = 'mixture'
  config.data.mixture = {
    'web': {'kind': 'webdataset', 'path': 'shards/*.tar', 'weight': 0.75},
    'art': {'kind': 'arrayrecord', 'path': 'data/art', 'weight': 0.25},
  }

The pipeline interleaves the parts in a fixed pattern, and shuffles each one for
itself, so that each epoch of a part has each of its images once. What is in
batch k is a function of the seed and k, on any number of hosts.
"""

import bisect
import collections
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.data.source import Source
from imagen_jax.errors import DataError, UsageError


class MixtureSource(Source):
  """Several sources as one: as a sequence, one behind the other.

  Args:
    size: side of the images in pixels.
    split: 'train', or 'eval' for the parts that have held-out images.
    mixture: {name: a `data` section with a positive `weight`}.

  Attributes:
    parts: the sources.
    weights: theirs, as fractions.

  Raises:
    UsageError: a section is invalid.
    DataError: a part is empty or unusable, or only some parts have embeddings
      of one encoder.
  """

  def __init__(
    self,
    size: int,
    split: str = 'train',
    *,
    mixture: Mapping[str, Mapping[str, Any]] | None = None,
  ) -> None:
    sections = _checked(mixture or {})
    names = [*sections]
    made = [_make(n, sections[n], size, split) for n in names]
    self.has_eval_split = any(held for _, held in made)
    if split == 'eval' and self.has_eval_split:
      names = [n for n, (_, held) in zip(names, made) if held]
      made = [pair for pair in made if pair[1]]
    self.parts = tuple(source for source, _ in made)
    total = math.fsum(sections[name]['weight'] for name in names)
    self.weights = tuple(sections[name]['weight'] / total for name in names)
    self._names = names
    self._ends = [*itertools.accumulate(map(len, self.parts))]
    self.text_header = self.parts[0].text_header
    for name, part in zip(names, self.parts):
      if not len(part):
        raise DataError(f'data.mixture.{name} has no images; check its path.')
      if part.text_header != self.text_header:
        raise DataError(
          f'data.mixture.{name} and {names[0]} differ in the embeddings that '
          'they have; make those of all with the same imagen-embed command, or '
          'set text=None in each part.'
        )

  @property
  def skipped(self) -> Sequence[tuple[str, str]]:  # type: ignore[override]
    return [
      (f'{name}: {one}', reason)
      for name, part in zip(self._names, self.parts)
      for one, reason in part.skipped
    ]

  @property
  def bad(self) -> Mapping[str, str]:  # type: ignore[override]
    return collections.ChainMap(
      *(
        {f'{name}: {one}': reason for one, reason in part.bad.items()}
        for name, part in zip(self._names, self.parts)
      )
    )

  @property
  def fingerprint(self) -> str:
    """sha256 of the parts' names, weights, lengths and fingerprints."""
    rows = [
      [name, weight, len(part), part.fingerprint]
      for name, weight, part in zip(self._names, self.weights, self.parts)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, i: int) -> dict[str, Any]:
    part, j, _ = self._find(i)
    return part[j]

  def example(self, i: int) -> dict[str, Any]:
    part, j, _ = self._find(i)
    return part.example(j)

  def caption(self, i: int) -> str:
    part, j, _ = self._find(i)
    return part.caption(j)

  def name(self, i: int) -> str:
    part, j, name = self._find(i)
    return f'{name}: {part.name(j)}'

  def note(self, name: str, reason: str) -> None:
    of, _, rest = name.partition(': ')
    self.parts[self._names.index(of)].note(rest, reason)

  def check_text(self, **text: Any) -> None:
    for part in self.parts:
      part.check_text(**text)

  def _find(self, i: int) -> tuple[Source, int, str]:
    """(part, index within it, name of the part) of an example."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    number = bisect.bisect_right(self._ends, i)
    part = self.parts[number]
    return part, i - self._ends[number] + len(part), self._names[number]


def _checked(mixture: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """The sections, each a section with a weight.

  Raises:
    UsageError: there are none, or one is invalid; names the key.
  """
  if not mixture:
    raise UsageError(
      "data.mixture is empty: it names sources, {'web': {'kind': "
      "'webdataset', 'path': …, 'weight': 0.75}, …}.",
      key='config.data.mixture',
    )
  for name, section in mixture.items():
    if not re.fullmatch(r'[\w-]+', str(name)):
      raise UsageError(
        f'data.mixture has a part {name!r}; a name is letters, digits, _ and '
        '-.',
        key='config.data.mixture',
      )
    weight = section.get('weight') if isinstance(section, Mapping) else None
    if not (
      isinstance(weight, (int, float))
      and not isinstance(weight, bool)
      and 0 < weight < math.inf
      and 'kind' in section
    ):
      raise UsageError(
        f'data.mixture.{name} is {section!r}; with data.kind=mixture it is a '
        'section with kind, path and a weight above 0.',
        key=f'config.data.mixture.{name}',
      )
  return {name: dict(section) for name, section in mixture.items()}


def _make(
  name: str, section: dict[str, Any], size: int, split: str
) -> tuple[Source, bool]:
  """(the source of a section, whether it has held-out images)."""
  from imagen_jax.data.sources import make_source

  options = {'text': 'auto'} | section
  del options['weight']
  for key in ('size', 'split'):
    if key in options:
      raise UsageError(
        f'data.mixture.{name}.{key} is not of a part: the run determines it.',
        key=f'config.data.mixture.{name}.{key}',
      )
  try:
    source = make_source(**options, size=size, split=split)
  except UsageError as error:
    part = f'config.data.mixture.{name}'
    key = (error.key or '').removeprefix('config.data.')
    raise UsageError(
      f'data.mixture.{name}: {error}', key=f'{part}.{key}' if key else part
    ) from error
  if source.parts:
    raise UsageError(
      f'data.mixture.{name} is a mixture itself; list its parts beside the '
      'others, with their fractions of the whole as weights.',
      key=f'config.data.mixture.{name}.kind',
    )
  return source, source.has_eval_split or bool(options.get('eval_path'))
