"""The shapes world: scenes, captions, held-out combinations, rendering."""

import hashlib
import pickle
import random

import numpy as np
import pytest

from imagen_jax.cli import prepare
from imagen_jax.data.sources import make_source
from imagen_jax.errors import UsageError
from imagen_jax.worlds import captions, shapes
from imagen_jax.worlds.contents import heldout
from imagen_jax.worlds.layout import BORDER, GAP, LARGE, SMALL
from imagen_jax.worlds.render import BACKGROUND, INSIDE, PALETTE, SECOND
from tests.worlds.understanding import understand

TRAIN = [shapes.scene(0, 'train', i) for i in range(3000)]
EVAL = [
  shapes.scene(0, 'eval', i, category=c)
  for c in shapes.CATEGORIES
  for i in range(200)
]


def test_a_scene_depends_on_its_arguments_only():
  order = random.Random(0).sample(range(100), 100)
  again = {i: shapes.scene(0, 'train', i) for i in order}
  assert [again[i] for i in range(100)] == TRAIN[:100]


def test_scenes_never_change_between_versions():
  text = '\n'.join(repr(s) for s in TRAIN[:200] + EVAL[::6])
  digest = hashlib.sha256(text.encode()).hexdigest()[:16]
  assert digest == 'a5ee067ed3044e04'


def test_seeds_splits_and_categories_share_no_stream():
  streams = [
    [shapes.scene(seed, split, i, category=c).things for i in range(20)]
    for seed, split, c in (
      (0, 'train', None),
      (1, 'train', None),
      (0, 'eval', None),
      (0, 'eval', 'single'),
    )
  ]
  places = [t.x for stream in streams for things in stream for t in things]
  assert len(set(places)) == len(places)


def combinations(scene):
  """{kind: combinations} that a scene shows or its caption states."""
  return {
    'colour_shape': {(t.colour, t.shape) for t in scene.things},
    'fill_shape': {(t.fill, t.shape) for t in scene.things},
    'relation_pair': {
      (word, scene.meaning.groups[a].shape, scene.meaning.groups[b].shape)
      for a, word, b in scene.meaning.relations
    },
  }


def test_held_out_combinations_never_occur_in_training():
  held = heldout()
  usual = [s for s in EVAL if s.category != 'heldout']
  for scene in TRAIN + usual:
    for kind, shown in combinations(scene).items():
      assert not shown & held[kind], scene.caption


def test_held_out_scenes_show_exactly_one_held_out_combination():
  held = heldout()
  seen = {kind: set() for kind in held}
  for i in range(600):
    scene = shapes.scene(1, 'eval', i, category='heldout')
    hits = {k: v & held[k] for k, v in combinations(scene).items()}
    assert sum(map(len, hits.values())) == 1, scene.caption
    for kind, found in hits.items():
      seen[kind] |= found
  # Relations come in both directions.
  assert seen == held


def test_each_part_of_a_held_out_combination_is_trained():
  shown = {
    k: set().union(*(combinations(s)[k] for s in TRAIN)) for k in heldout()
  }
  for kind, held in heldout().items():
    for place in range(len(next(iter(held)))):
      trained = {c[place] for c in shown[kind]}
      assert {c[place] for c in held} <= trained


def test_held_out_relations_are_held_out_both_ways_round():
  for word, a, b in heldout()['relation_pair']:
    assert (captions.OPPOSITE[word], b, a) in heldout()['relation_pair']


def test_a_caption_says_its_meaning():
  for scene in TRAIN + EVAL:
    assert understand(scene.caption) == scene.meaning, scene.caption


def test_things_are_as_the_meaning_says():
  for scene in TRAIN + EVAL:
    things = iter(scene.things)
    for group in scene.meaning.groups:
      for thing in (next(things) for _ in range(group.count)):
        assert (thing.shape, thing.colour) == (group.shape, group.colour)
        assert thing.fill == (group.fill or 'plain')
        low, high = {None: (0, 1), 'small': SMALL, 'large': LARGE}[group.size]
        assert low <= thing.diameter <= high
    assert next(things, None) is None
    assert 1 <= len(scene.things) <= 5
    assert scene.meaning.background in (None, scene.background)


def test_things_neither_touch_one_another_nor_the_border():
  for scene in TRAIN + EVAL:
    for i, a in enumerate(scene.things):
      for c in (a.x, a.y):
        assert BORDER <= c - a.diameter / 2 and c + a.diameter / 2 <= 1 - BORDER
      for b in scene.things[:i]:
        apart = max(abs(a.x - b.x), abs(a.y - b.y))
        assert apart >= (a.diameter + b.diameter) / 2 + GAP - 1e-9


def test_stated_relations_hold_by_a_clear_margin():
  for scene in TRAIN + EVAL:
    for i, word, j in scene.meaning.relations:
      a, b = scene.things[i], scene.things[j]
      dx, dy = a.x - b.x, a.y - b.y
      along, across = {
        'left of': (-dx, dy),
        'right of': (dx, dy),
        'above': (-dy, dx),
        'below': (dy, dx),
      }[word]
      assert along >= (a.diameter + b.diameter) / 2
      assert abs(across) < 0.5 * along


def test_things_stand_out_from_their_background():
  for scene in TRAIN + EVAL:
    ground = np.array(BACKGROUND[scene.background])
    for thing in scene.things:
      assert thing.colour != scene.background
      assert np.linalg.norm(ground - PALETTE[thing.colour]) > 75


def test_captions_use_every_word_of_the_vocabulary_and_no_other():
  said = {
    word
    for s in TRAIN + [shapes.scene(2, 'train', i) for i in range(4000)]
    for word in captions.words(s.caption)
  }
  assert said == captions.vocabulary()


def test_the_note_on_what_can_be_rendered_uses_known_words():
  for group in (captions.SHAPES, captions.COLOURS, captions.FILLS):
    assert all(word in captions.describe() for word in group)


def test_every_shape_colour_fill_and_background_can_be_rendered():
  assert set(INSIDE) == set(captions.SHAPES)
  assert set(PALETTE) == set(captions.COLOURS)
  assert set(SECOND) == set(captions.FILLS) - {'plain'}
  assert set(BACKGROUND) == set(captions.BACKGROUNDS)


@pytest.mark.parametrize('shape', captions.SHAPES)
def test_a_shape_fills_its_box_one_way_and_is_centred_in_it(shape):
  line = np.linspace(-1.2, 1.2, 481)
  inside = INSIDE[shape](*np.meshgrid(line, line))
  spans = []
  for axis in (0, 1):
    at = line[inside.any(axis)]
    assert abs(at[0] + at[-1]) < 0.03
    spans.append(at[-1] - at[0])
  assert 1.97 <= max(spans) <= 2.01


def test_a_small_render_is_nearly_the_box_mean_of_a_large_one():
  for scene in EVAL[::40]:
    large = shapes.render(scene, 256).astype(float)
    for size in (16, 64):
      k = 256 // size
      small = large.reshape(size, k, size, k, 3).mean((1, 3))
      error = np.abs(small - shapes.render(scene, size))
      assert error.mean() < 1 and error.max() < 30


def test_a_render_shows_its_colours_where_its_things_are():
  for scene in EVAL[::10]:
    image = shapes.render(scene, 200)
    assert tuple(image[0, 0]) == BACKGROUND[scene.background]
    for t in scene.things:
      if t.fill == 'plain' and t.shape not in ('moon', 'heart'):
        pixel = image[int(t.y * 200), int(t.x * 200)]
        assert tuple(pixel) == PALETTE[t.colour]


def test_any_resolution_can_be_rendered():
  for size in (1, 7, 100, 513):
    assert shapes.render(EVAL[0], size).shape == (size, size, 3)


def test_a_source_is_picklable_and_random_access():
  source = shapes.ShapesSource(0, 'train', 32, num=50)
  again = pickle.loads(pickle.dumps(source))
  assert len(again) == 50
  example = again[np.int64(7)]
  assert example['caption'] == TRAIN[7].caption
  np.testing.assert_array_equal(example['image'], shapes.render(TRAIN[7], 32))
  with pytest.raises(IndexError):
    source[50]


def test_a_mixture_sets_the_fractions_of_the_categories():
  mixture = {'fill': 0.75, 'single': 0.25}
  found = [
    shapes.scene(0, 'train', i, mixture=mixture).category for i in range(400)
  ]
  assert set(found) == {'fill', 'single'}
  assert 270 < found.count('fill') < 330  # 3.5 sigma about 300
  source = make_source(kind='shapes', size=16, mixture={'fill': 1.0})
  said = [source[i]['caption'] for i in range(20)]
  assert said == [
    shapes.scene(0, 'train', i, mixture={'fill': 1.0}).caption
    for i in range(20)
  ]


@pytest.mark.parametrize(
  'category, numbers', [('trio', {3}), ('crowd', {4, 5})]
)
def test_crowded_categories_have_many_things(category, numbers):
  scenes = [
    shapes.scene(0, 'train', i, mixture={category: 1.0}) for i in range(40)
  ]
  assert {len(scene.things) for scene in scenes} == numbers


def test_fill_pair_is_always_of_two_things():
  made = [
    shapes.scene(0, 'train', i, mixture={'fill_pair': 1.0}) for i in range(60)
  ]
  assert {len(s.meaning.groups) for s in made} == {2}
  assert {g.fill for s in made for g in s.meaning.groups} == set(captions.FILLS)
  assert all(
    (a.colour, a.shape) != (b.colour, b.shape)
    for a, b in (s.meaning.groups for s in made)
  )


@pytest.mark.parametrize(
  'mixture',
  [
    {'fill': 0.5, 'pair': 0.4},
    {'heldout': 1.0},
    {'fill': -0.5, 'pair': 1.5},
  ],
)
def test_a_wrong_mixture_is_a_usage_error(mixture):
  with pytest.raises(UsageError):
    make_source(kind='shapes', size=16, mixture=mixture)


def test_held_out_scenes_cannot_be_asked_of_training():
  with pytest.raises(ValueError):
    shapes.scene(0, 'train', 0, category='heldout')
  with pytest.raises(ValueError):
    shapes.scene(0, 'test', 0)
  with pytest.raises(ValueError):
    shapes.scene(0, 'eval', 0, category='pairs')


@pytest.mark.parametrize(
  'prompt',
  ('', 'a dog', 'a red circle above', 'red', 'a red red star', 'six stars'),
)
def test_a_prompt_that_is_not_understood_has_no_meaning(prompt):
  assert understand(prompt) is None


def test_a_typed_prompt_is_understood():
  group = captions.Group
  assert understand(
    'The big red heart is to the left of a star, on a pale blue background!'
  ) == captions.Meaning(
    (group('heart', 'red', size='large'), group('star', None)),
    ((0, 'left of', 1),),
    'blue',
  )


def test_shapes_can_be_prepared(tmp_path):
  out = tmp_path / 'out'
  command = f'--source shapes --num 5 --size 16 --out {out}'.split()
  assert prepare.main(command) == 0
  shapes = make_source(kind='shapes', size=16)
  prepared = make_source(kind='arrayrecord', path=out, size=16)
  assert [e['caption'] for e in prepared] == [
    shapes[i]['caption'] for i in range(5)
  ]
  np.testing.assert_array_equal(prepared[4]['image'], shapes[4]['image'])


def test_a_world_has_no_end_so_that_preparing_it_needs_a_number(tmp_path):
  command = f'--source shapes --size 16 --out {tmp_path / "out"}'.split()
  assert prepare.main(command) == 2
  assert not (tmp_path / 'out').exists()
