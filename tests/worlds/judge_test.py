"""The judge: what it reads, what it accepts, and its error rate."""

import ast
import dataclasses
import inspect
import random

import numpy as np
import pytest

from benchmarks import shapes_judge
from imagen_jax.worlds import judge as judging
from imagen_jax.worlds import (
  naming,
  reading,
  regions,
  shapes,
  silhouettes,
)
from imagen_jax.worlds.captions import Group, Meaning
from imagen_jax.worlds.judge import judge, read, related
from tests.worlds.understanding import understand


def verdict(prompt, *things, background='white', size=256):
  """Judges a rendered scene of (shape, colour, fill, x, y, diameter) things."""
  things = tuple(shapes.Thing(*t) for t in things)
  scene = shapes.Scene('', things, background, 'single', Meaning(()))
  return judge(shapes.render(scene, size), understand(prompt))


CIRCLE = ('circle', 'red', 'plain', 0.3, 0.25, 0.3)
SQUARE = ('square', 'blue', 'plain', 0.4, 0.72, 0.4)


# `benchmarks/shapes_judge.py` measures more sizes and scenes.
SIZES = [(32, 50), (64, 50), (128, 25), (256, 17)]


@pytest.mark.parametrize('size, num', SIZES)
def test_clean_renders_are_judged_correct(size, num):
  right = shapes_judge.accuracy(0, num, size)
  assert np.mean(list(right.values())) >= 0.99, right


@pytest.mark.parametrize('size, num', SIZES[1::2])
def test_mildly_blurred_and_noisy_renders_are_judged_correct(size, num):
  right = shapes_judge.accuracy(0, num, size, how='degraded')
  assert np.mean(list(right.values())) >= 0.95, right


@pytest.mark.parametrize('how', ['shuffled', 'spoiled'])
@pytest.mark.parametrize('size, num', SIZES[1::2])
def test_wrong_captions_are_refused(size, num, how):
  right = shapes_judge.accuracy(0, num, size, how=how)
  assert np.mean(list(right.values())) <= 0.02, right


def test_soft_images_keep_their_shapes_and_mostly_their_fills():
  rng, right = np.random.default_rng(0), []
  for i in range(30):
    scene = shapes.scene(0, 'eval', i, category='fill')
    image = shapes_judge.degrade(shapes.render(scene, 256), rng, blur=1 / 64)
    right.append(judge(image, scene.meaning).aspects)
  assert all(aspects['shape'] and aspects['colour'] for aspects in right)
  assert sum(aspects['fill'] for aspects in right) >= 22


def test_the_judge_shares_no_geometry_or_palette_with_the_renderer():
  allowed = {'captions', 'reading', 'naming', 'silhouettes', 'regions'}
  for module in (judging, reading, naming, silhouettes, regions):
    for node in ast.walk(ast.parse(inspect.getsource(module))):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f'{node.module}.{alias.name}' for alias in node.names]
      else:
        continue
      for name in names:
        module = name.removeprefix('imagen_jax.worlds.').split('.')[0]
        assert module in allowed or not name.startswith('imagen_jax'), name


def test_a_correct_image_is_correct_in_every_aspect():
  result = verdict('a small red circle above a blue square', CIRCLE, SQUARE)
  assert result.correct
  assert {k: v for k, v in result.aspects.items() if v is not None} == {
    'count': True,
    'shape': True,
    'colour': True,
    'size': True,
    'relation': True,
  }


@pytest.mark.parametrize(
  'prompt, wrong',
  [
    ('a red circle below a blue square', 'relation'),
    ('a red circle left of a blue square', 'relation'),
    ('a green circle above a blue square', 'colour'),
    ('a red heart above a blue square', 'shape'),
    ('a blue circle above a red square', 'colour'),
    ('a large red circle above a blue square', 'size'),
    ('a striped red circle above a blue square', 'fill'),
    ('a red circle above a blue square on black', 'background'),
    ('a red circle', 'count'),
    ('two red circles above a blue square', 'count'),
  ],
)
def test_one_wrong_word_makes_an_image_wrong_in_that_aspect(prompt, wrong):
  result = verdict(prompt, CIRCLE, SQUARE)
  assert not result.correct
  assert result.aspects[wrong] is False


def test_what_a_caption_leaves_open_may_be_anything():
  striped = ('circle', 'red', 'striped', 0.5, 0.5, 0.6)
  assert verdict('a red circle', striped).correct
  assert verdict('a circle on white', striped).correct


def test_things_are_matched_to_words_whatever_their_order():
  things = [
    ('star', 'yellow', 'plain', x, y, 0.26)
    for x, y in ((0.2, 0.2), (0.8, 0.2), (0.2, 0.8))
  ] + [('moon', 'pink', 'plain', 0.7, 0.7, 0.26)]
  assert verdict('a pink moon and three yellow stars', *things[::-1]).correct
  assert not verdict('three pink moons and a yellow star', *things).correct


def test_fills_are_read_only_where_the_image_is_large_enough():
  striped = ('square', 'green', 'striped', 0.5, 0.5, 0.6)
  for size, fill in ((128, None), (256, 'striped'), (512, 'striped')):
    thing = shapes.Thing(*striped)
    scene = shapes.Scene('', (thing,), 'white', '', Meaning(()))
    assert read(shapes.render(scene, size)).things[0].fill == fill


def test_relations_follow_the_offset_less_a_tenth_of_the_extents():
  thing = reading.Found('star', 'red', None, 'small', 0.5, 0.5, 0.2, 0.2, 1.0)

  def at(x, y):
    return dataclasses.replace(thing, x=x, y=y)

  assert related(at(0.2, 0.5), 'left of', thing)
  assert related(at(0.8, 0.5), 'right of', thing)
  assert related(at(0.5, 0.2), 'above', thing)
  assert related(at(0.5, 0.8), 'below', thing)
  assert not related(at(0.2, 0.5), 'right of', thing)
  # 0.04 is a tenth of the extents: 0.14 − 0.04 is half of an offset of 0.2,
  # which is (0.14, 0.1428), and 0.08 − 0.04 is half of 0.08.
  for y in (0.5 - 0.142, 0.5 + 0.142):
    assert related(at(0.5 - 0.14, y), 'left of', thing)
  for y in (0.5 - 0.144, 0.5 + 0.144):
    assert not related(at(0.5 - 0.14, y), 'left of', thing)
  assert related(at(0.5, 0.5 - 0.081), 'above', thing)
  assert not related(at(0.5, 0.5 - 0.079), 'above', thing)
  # Of two directions, both may hold or none.
  assert related(at(0.8, 0.8), 'right of', thing)
  assert related(at(0.8, 0.8), 'below', thing)
  assert not related(thing, 'left of', thing)


def test_specks_are_ignored_and_blobs_are_not():
  image = np.full((128, 128, 3), 255, np.uint8)
  image[60:64, 60:64] = 0
  assert read(image).things == ()
  image[20:50, 20:23] = image[40:50, 20:60] = (200, 30, 30)
  (thing,) = read(image).things
  assert (thing.shape, thing.colour) == ('unknown', 'red')


@pytest.mark.parametrize('size', [8, 50, 64, 300, 512])
def test_no_image_makes_the_judge_fail(size):
  rng = np.random.default_rng(size)
  ramp = np.indices((size, size)).sum(0) % 256
  for image in (
    rng.integers(0, 256, (size, size, 3)),
    np.zeros((size, size, 3)),
    np.repeat(ramp[..., None], 3, -1),
  ):
    meaning = Meaning((Group('star', 'red', 3),))
    assert not judge(image.astype(np.uint8), meaning).correct


def test_too_many_things_to_match_are_refused():
  with pytest.raises(ValueError):
    judge(np.zeros((64, 64, 3), np.uint8), Meaning((Group('star', 'red', 7),)))


def test_spoiling_changes_exactly_one_word():
  rng = random.Random(0)
  for i in range(200):
    meaning = shapes.scene(0, 'eval', i).meaning
    spoiled = shapes_judge.spoil(meaning, rng)
    changes = [
      getattr(a, f.name) != getattr(b, f.name)
      for a, b in zip(meaning.groups, spoiled.groups)
      for f in dataclasses.fields(Group)
    ]
    changes += [a != b for a, b in zip(meaning.relations, spoiled.relations)]
    changes.append(meaning.background != spoiled.background)
    assert sum(changes) == 1
