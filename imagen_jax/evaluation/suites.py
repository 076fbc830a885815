"""What is drawn and how it is scored: one small class per suite.

A suite has `label`, `num`, and

  items()                  every `Item` of a run
  digest()                 16 hex digits for the prompts
  judge(item, image)       fields to keep of a picture, as it is drawn
  score(folder, records)   {suite name: {category: score}} of a finished run
  provenance(), notes(resolution)
"""

import dataclasses
import hashlib
import json

from imagen_jax.errors import UsageError
from imagen_jax.evaluation import shapes_suite


def make(args):
  """The suite that the command line asks for.

  Raises:
    UsageError, DataError, ModelError: what it needs is missing or broken.
  """
  return Shapes(
    _chosen(args.categories, shapes_suite.CATEGORIES),
    args.num or 300,
    args.from_truth,
  )


def _chosen(text, known):
  """The categories named in a list such as 'pair,count', in known order."""
  if text is None:
    return tuple(known)
  names = text.split(',')
  for name in names:
    if name not in known:
      raise UsageError(
        f'there is no category {name!r}; there are {", ".join(known)}.'
      )
  return tuple(name for name in known if name in names)


def digest(value):
  """16 hex digits that stand for a JSON value."""
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The judge's scores, see `shapes_suite`."""

  categories: tuple[str, ...]
  num: int
  from_truth: bool = False

  @property
  def label(self):
    return 'shapes_from_truth' if self.from_truth else 'shapes'

  def items(self):
    return shapes_suite.items(self.categories, self.num)

  def digest(self):
    # Not of `num`: a longer run continues a shorter one.
    some = shapes_suite.items(shapes_suite.CATEGORIES, 20)
    return digest([item.prompt for item in some])

  judge = staticmethod(shapes_suite.record)
  true_picture = staticmethod(shapes_suite.true_picture)

  def score(self, folder, records):
    result, own = shapes_suite.score(records, self.categories, self.num)
    suffix = '_from_truth' if self.from_truth else ''
    return {self.label: result, f'judge{suffix}': own}

  def provenance(self):
    return {'scenes': f'seed {shapes_suite.SEED}, split eval'}

  def notes(self, resolution):
    note = shapes_suite.notes(resolution)
    return [note] if note else []
