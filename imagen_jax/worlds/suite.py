"""The shapes suite: does the image show what the prompt says?

Like DrawBench (Section 3, Saharia et al. 2022), with prompts by category, but
with the classical judge in place of human raters. The scenes have a seed of
their own and come from the split 'eval', which shares no random stream with
training; the category `heldout` has only combinations held out of training.
"""

import collections
import dataclasses
import pathlib
import typing

import numpy as np
from jaxtyping import UInt8

from imagen_jax.evaluation import scores
from imagen_jax.evaluation import suite as suites
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.scores import Categories
from imagen_jax.evaluation.suite import Item, Record, Records
from imagen_jax.worlds import shapes
from imagen_jax.worlds.judge import compare, judge, read
from imagen_jax.worlds.reading import FILL_SIZE, Found, Reading

SEED = 2205  # of the evaluation scenes; nothing else uses it
CONTROL = 'shuffled'


def scene(category: str, number: int) -> shapes.Scene:
  """Scene `number` of a category of the evaluation scenes."""
  return shapes.scene(SEED, 'eval', number, category=category)


@dataclasses.dataclass(frozen=True)
class ShapesSuite(suites.Suite):
  """The fraction of images that the judge finds correct, by category.

  Attributes:
    categories: those to score.
    num: images of each.
    from_truth: whether the first stage upsamples true images.
  """

  categories: tuple[str, ...]
  num: int
  from_truth: bool = False
  uses = ('num', 'categories', 'from_truth')
  controls = (CONTROL, 'judge')

  @classmethod
  def from_config(cls, config: EvalConfig) -> 'ShapesSuite':
    categories = suites.choose(config.categories, shapes.CATEGORIES)
    return cls(categories, config.num or 300, config.from_truth)

  @property
  def label(self) -> str:
    return 'shapes_from_truth' if self.from_truth else 'shapes'

  @property
  def reference(self) -> str:
    return 'judge_from_truth' if self.from_truth else 'judge'

  def heading(self) -> tuple[str, str]:
    if self.from_truth:
      return 'Super-resolution of true images', (
        'The super-resolution stages were given true low-resolution images, so '
        'every error here is theirs.'
      )
    return 'Does the image show what the prompt says?', (
      'The fraction of images that a classical judge finds correct in every '
      "respect, with Wilson's 95 % intervals. The green tick is the judge's "
      'own accuracy on true images of the same scenes, “judge” that of all '
      'categories; “shuffled” is the control, the same images judged by '
      'another prompt.'
    )

  def items(self) -> list[Item]:
    return suites.number(
      (category, scene(category, i).caption)
      for category in self.categories
      for i in range(self.num)
    )

  def digest(self) -> str:
    # `num` is not part of it: a longer run may resume a shorter one.
    some = dataclasses.replace(self, categories=shapes.CATEGORIES, num=20)
    return suites.digest([item.prompt for item in some.items()])

  def true_image(self, item: Item, size: int) -> UInt8[np.ndarray, 's s 3']:
    return shapes.render(scene(item.category, item.number), size)

  def judge(self, item: Item, image: UInt8[np.ndarray, 'h w 3']) -> Record:
    """The judge's verdict on an image and what it read.

    `judge` in the record is its verdict on the true image of the same scene
    at the same size.
    """
    meaning = scene(item.category, item.number).meaning
    reading = read(image)
    verdict = compare(reading, meaning)
    truth = judge(self.true_image(item, image.shape[0]), meaning)
    return {
      'correct': verdict.correct,
      'aspects': verdict.aspects,
      'reading': dataclasses.asdict(reading),
      'judge': truth.correct,
    }

  def score(
    self, folder: pathlib.Path, records: Records
  ) -> dict[str, Categories]:
    """Accuracies of the model, and of the judge on true images.

    The model's have two more categories: `shuffled`, the same images judged by
    the next prompt of their category, and `judge`, the judge's accuracy over
    all true images.
    """
    result, own, control, truth = {}, {}, [], []
    for category in self.categories:
      found = [records[category, i] for i in range(self.num)]
      result[category] = scores.accuracy(r['correct'] for r in found)
      own[category] = scores.accuracy(r['judge'] for r in found)
      truth += [r['judge'] for r in found]
      for i, record in enumerate(found):
        other = scene(category, (i + 1) % self.num).meaning
        control.append(compare(_reading(record), other).correct)
    result[CONTROL] = scores.accuracy(control)
    result['judge'] = scores.accuracy(truth)
    return {self.label: result, self.reference: own}

  def confusions(self, records: Records) -> dict[str, dict[str, dict]]:
    """Confusion matrices {aspect: {prompted: {seen: count}}}.

    Aspects: colour, shape and fill, where prompt and image both have one thing;
    number, over all prompts.
    """
    fields = ('colour', 'shape', 'fill')
    tables: dict[str, dict[str, dict]] = {
      name: collections.defaultdict(collections.Counter)
      for name in (*fields, 'number')
    }
    for (category, i), record in sorted(records.items()):
      groups = scene(category, i).meaning.groups
      things = _reading(record).things
      prompted = sum(group.count for group in groups)
      tables['number'][str(prompted)][str(min(len(things), 6))] += 1
      if prompted == len(things) == 1:
        for field in fields:
          a, b = getattr(groups[0], field), getattr(things[0], field)
          if None not in (a, b):
            tables[field][a][b] += 1
    return tables

  def provenance(self) -> dict[str, typing.Any]:
    return {'num': self.num, 'scenes': f'seed {SEED}, split eval'}

  def notes(self, resolution: int) -> list[str]:
    if resolution >= FILL_SIZE:
      return []
    return [
      f'fills are not judged below {FILL_SIZE} pixels, and these images have '
      f'{resolution}: the category fill then scores the other aspects only.'
    ]


def _reading(record: Record) -> Reading:
  kept = record['reading']
  return Reading(kept['background'], tuple(Found(**t) for t in kept['things']))
