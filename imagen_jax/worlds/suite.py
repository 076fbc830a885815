"""The shapes suite: does the image show what the sentence says?

DrawBench's idea (Section 3, Saharia et al. 2022) in a world where no rater is
needed: prompts by category, and the classical judge in place of people. The
scenes come from a seed of their own in the split 'eval', which shares no
random stream with training; `heldout` holds only combinations never trained.
"""

import collections
import dataclasses

from imagen_jax.evaluation import scores
from imagen_jax.evaluation.generation import Item
from imagen_jax.worlds import shapes
from imagen_jax.worlds.judge import compare, judge, read
from imagen_jax.worlds.reading import FILL_SIZE, Found, Reading

SEED = 2205  # of the worlds kept for evaluation; nothing else uses it
CATEGORIES = shapes.CATEGORIES
CONTROL = 'shuffled'


def scene(category, number):
  """Scene `number` of a category, of those reserved for evaluation."""
  return shapes.scene(SEED, 'eval', number, category=category)


def items(categories, num):
  """The images of the suite, `num` of each category.

  A sentence that comes again in its category gets another image.
  """
  result = []
  for category in categories:
    seen = collections.Counter()
    for number in range(num):
      prompt = scene(category, number).caption
      result.append(Item(category, number, prompt, seen[prompt]))
      seen[prompt] += 1
  return result


def true_image(item, size):
  """The scene itself, as a perfect model would render it: uint8 [s, s, 3]."""
  return shapes.render(scene(item.category, item.number), size)


def record(item, image):
  """What to keep of one image: the judge's verdict and what it read.

  `judge` in it says whether the judge finds the true image of the same
  scene right, at the same size.
  """
  meaning = scene(item.category, item.number).meaning
  reading = read(image)
  verdict = compare(reading, meaning)
  truth = judge(true_image(item, image.shape[0]), meaning)
  return {
    'correct': verdict.correct,
    'aspects': verdict.aspects,
    'reading': dataclasses.asdict(reading),
    'judge': truth.correct,
  }


def score(records, categories, num):
  """Scores of a finished run.

  Args:
    records: {(category, number): record}, see `generation.read_records`.
    categories: those to score.
    num: images of each.

  Returns:
    ({category: fraction}, {category: fraction of true images judged right}).
    The first has two more: `shuffled`, the same images judged by the sentence
    of the next one in their category, and `judge`, of all true images.
  """
  result, own, control = {}, {}, []
  for category in categories:
    found = [records[category, number] for number in range(num)]
    result[category] = scores.fraction(r['correct'] for r in found)
    own[category] = scores.fraction(r['judge'] for r in found)
    for number, r in enumerate(found):
      other = scene(category, (number + 1) % num).meaning
      control.append(compare(_reading(r), other).correct)
  result[CONTROL] = scores.fraction(control)
  result['judge'] = scores.fraction(
    records[c, i]['judge'] for c in categories for i in range(num)
  )
  return result, own


def _reading(record):
  said = record['reading']
  return Reading(said['background'], tuple(Found(**t) for t in said['things']))


def confusions(records):
  """{what: {(said, seen): count}} for colour, shape, fill and number.

  Colours, shapes and fills are those of prompts for one thing of which the
  image shows one thing; numbers those of all prompts.
  """
  tables = {k: collections.Counter() for k in ('colour', 'shape', 'fill')}
  tables['number'] = collections.Counter()
  for (category, number), r in sorted(records.items()):
    groups = scene(category, number).meaning.groups
    things = _reading(r).things
    said = sum(group.count for group in groups)
    tables['number'][str(said), str(min(len(things), 6))] += 1
    if said == len(things) == 1:
      for field in ('colour', 'shape', 'fill'):
        pair = getattr(groups[0], field), getattr(things[0], field)
        if None not in pair:
          tables[field][pair] += 1
  return tables


def notes(resolution):
  """What a reader must know of scores at a resolution, or None."""
  if resolution < FILL_SIZE:
    return (
      f'fills are not judged below {FILL_SIZE} pixels, and these images '
      f'have {resolution}: the category fill then scores the rest alone.'
    )
  return None
