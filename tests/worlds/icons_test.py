"""The icons world, on small packages."""

import json
import pickle
import re

import numpy as np
import pytest

from imagen_jax.data import shards
from imagen_jax.data import source as sources
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError, UsageError
from imagen_jax.worlds import icon_images, icon_scenes, icon_things, icons
from imagen_jax.worlds.icon_scenes import World, scene
from imagen_jax.worlds.icon_sets import IconSet, read_sets
from tests.worlds import tiny_icons

MANY = tuple(
  icon_things.Thing(name, str(i), synonyms, heldout)
  for i, (name, synonyms, heldout) in enumerate(icon_things.listed().values())
)
TRAIN = World(MANY, ('3D', 'flat'))
EVAL = World(MANY, ('3D', 'flat'), split='eval')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_icons.write(tmp_path_factory.mktemp('icons'))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp()))


def test_a_folder_gives_the_style_and_licence_of_each_set(folder):
  found = {s.style: s for s in read_sets(folder)}
  licences = {style: s.licence for style, s in found.items()}
  assert licences == {'flat': 'MIT', '3D': 'MIT', 'cartoon': 'CC-BY-4.0'}
  assert found['flat'].names['2764'] == 'red heart'
  assert '1f1e6' not in found['flat'].names  # it has no image
  assert found['3D'].names == {} and len(found['3D'].images) == 5


def test_a_folder_without_packages_is_an_error(tmp_path):
  with pytest.raises(DataError):
    read_sets(tmp_path)


def test_a_package_cut_short_is_an_error(folder, tmp_path):
  data = (folder / 'flat.tgz').read_bytes()
  (tmp_path / 'flat.tgz').write_bytes(data[: len(data) // 2])
  with pytest.raises(DataError):
    read_sets(tmp_path)


def test_things_are_those_of_all_styles_the_everyday_ones_first(folder):
  source = icons.IconsSource(folder, 32)
  names = [thing.name for thing in source.world.things]
  assert names == ['dog', 'cat', 'fox', 'car', 'red heart']
  assert source.world.styles == ('3D', 'cartoon', 'flat')
  assert len(icons.IconsSource(folder, 32, things=2).world.things) == 2
  alone = icons.IconsSource(folder, 32, styles=('3D',))  # names of the others
  assert [thing.name for thing in alone.world.things] == names


def test_an_image_shows_the_things_where_the_scene_says(folder):
  source = icons.IconsSource(folder, 64, split='eval')
  colours = [c for _, c in tiny_icons.THINGS.values() if c != (0, 150, 150)]
  for i in range(20):
    found, image = source.scene(i), source[i]['image'].astype(float)
    assert image.shape == (64, 64, 3) and source[i]['caption'] == found.caption
    for thing, (x, y, _) in zip(found.things, found.places):
      at = image[int(64 * y), int(64 * x)]
      np.testing.assert_allclose(at, colours[thing], atol=3)
    ground = icon_scenes.BACKGROUNDS[found.background]
    np.testing.assert_allclose(image[0, 0], ground, atol=1)


def test_a_small_image_is_the_mean_of_a_large_one(folder):
  small, large = (icons.IconsSource(folder, s, seed=3) for s in (64, 256))
  for i in range(8):
    blocks = large[i]['image'].reshape(64, 4, 64, 4, 3).mean((1, 3))
    error = np.abs(blocks - small[i]['image'])
    assert error.mean() < 1.5


def test_an_icon_fills_its_square_in_one_direction(folder):
  (one,) = [s for s in read_sets(folder) if s.style == '3D']
  alpha = np.asarray(icon_images.rasterise(one.images['1f415'], 56))[..., 3]
  rows, columns = np.nonzero(alpha > 128)
  assert (columns.min(), columns.max()) == (0, 55)
  assert (rows.min(), rows.max()) == (14, 41)  # half as high, in the middle


def test_icons_are_rasterised_once(folder, monkeypatch):
  first = icons.IconsSource(folder, 32, seed=1)
  monkeypatch.setattr(icon_images, 'rasterise', None)
  again = icons.IconsSource(folder, 32, seed=1)
  assert (again[5]['image'] == first[5]['image']).all()
  assert again.fingerprint == first.fingerprint


def test_a_workers_copy_reads_the_same_files(folder):
  source = icons.IconsSource(folder, 32, seed=1)
  packed = pickle.dumps(source)
  assert len(packed) < 20_000 < sum(x.nbytes for x in source._levels)
  copied = pickle.loads(packed)
  assert (copied[5]['image'] == source[5]['image']).all()
  assert copied.fingerprint == source.fingerprint


def test_without_a_cache_a_copy_has_the_images(folder, monkeypatch):
  monkeypatch.setattr(icon_images.paths, 'cache_folder', lambda: None)
  source = icons.IconsSource(folder, 32, seed=1)
  copied = pickle.loads(pickle.dumps(source))
  assert (copied[5]['image'] == source[5]['image']).all()


def test_of_things_with_one_name_there_is_the_first():
  """'spouting whale' is called a whale, and there is another whale."""
  names = {'1': 'whale', '2': 'spouting whale', '3': 'fox', '4': 'elder'}
  one = IconSet('flat', 'MIT', dict.fromkeys(names, b''), names)
  things = icon_things.choose([one], [one], None)
  assert [t.name for t in things] == ['fox', 'whale', 'elder']
  assert {t.name: t.code for t in things}['whale'] == '2'


def test_names_of_characters_are_synonyms_if_they_name_a_thing():
  codes = {'1f41e': 'ladybug', '1f617': 'kissing face', '2660': 'spade suit'}
  things = [icon_things._thing(code, name) for code, name in codes.items()]
  monday = icon_things._thing('1f617', 'whistle')
  assert things[1].synonyms == things[2].synonyms == monday.synonyms == ()
  assert icon_things._thing('1f41e', 'bug of luck').synonyms == ('lady beetle',)


def test_a_damaged_icon_is_named(folder, tmp_path):
  files = tiny_icons.iconify('fluent-emoji-flat')
  tables = json.loads(files['icons.json'])
  tables['icons']['fox']['body'] = '<g/>'  # nothing to see
  files['icons.json'] = json.dumps(tables).encode()
  tiny_icons.pack(tmp_path / 'flat.tgz', files)
  with pytest.raises(DataError, match='fox'):
    icons.IconsSource(tmp_path, 32)


@pytest.mark.parametrize(
  'options, key',
  [
    ({'styles': ('3D', 'outlined')}, 'styles'),
    ({'licences': ('OFL-1.1',)}, 'licences'),
    ({'styles': ('cartoon',), 'licences': ('MIT',)}, 'styles'),
    ({'things': 6}, 'things'),
    ({'mixture': {'single': 0.5}}, 'mixture'),
  ],
)
def test_what_the_sets_do_not_have_is_a_users_error(folder, options, key):
  with pytest.raises(UsageError) as error:
    make_source(kind='icons', path=str(folder), size=32, **options)
  assert error.value.key == f'config.data.{key}'


def test_a_mixture_sets_the_fractions_of_the_categories(folder):
  mixture = {'single': 0.75, 'pair': 0.25}
  source = icons.IconsSource(folder, 32, mixture=mixture)
  found = [source.scene(i).category for i in range(400)]
  assert set(found) == {'single', 'pair'}
  assert 274 < found.count('single') < 326  # 3 sigma about 300


def test_a_licence_leaves_out_the_other_sets(folder):
  source = icons.IconsSource(folder, 32, licences=('MIT',))
  assert source.world.styles == ('3D', 'flat')


def test_examples_are_a_function_of_seed_split_and_index(folder):
  a, b = icons.IconsSource(folder, 32), icons.IconsSource(folder, 32)
  assert isinstance(a, sources.Source) and a.endless and a.has_eval_split
  assert (a[7]['image'] == b[7]['image']).all() and a.caption(7) == b.caption(7)
  others = [
    icons.IconsSource(folder, 32, seed=1),
    icons.IconsSource(folder, 32, split='eval'),
  ]
  for other in others:
    assert any(other.caption(i) != a.caption(i) for i in range(5))


def test_training_never_shows_or_says_what_is_held_out():
  held = {name.lower() for thing in MANY for name in thing.heldout}
  held |= {icon_things.plural(name) for name in held}
  pattern = re.compile(rf'\b({"|".join(map(re.escape, held))})\b', re.I)
  kinds = set()
  for i in range(4000):
    found = scene(TRAIN, i)
    kinds.add((found.category, len(found.groups), found.groups[0].count))
    assert not pattern.search(found.caption), found.caption
    shown = [MANY[group.thing] for group in found.groups]
    styles = [icon_things.held_style(thing, TRAIN.styles) for thing in shown]
    assert TRAIN.styles[found.style] not in styles
    assert len(shown) == 1 or not icon_things.held_pair(*shown)
  counts = {('count', 1, n) for n in (2, 3, 4)}
  assert kinds == {('single', 1, 1), ('pair', 2, 1)} | counts


def test_held_out_scenes_show_what_is_held_out():
  for i in range(200):
    found = scene(EVAL, i, 'heldout_style')
    style = icon_things.held_style(MANY[found.things[0]], EVAL.styles)
    assert style == EVAL.styles[found.style]
    assert style.lower() in found.caption.lower()
    found = scene(EVAL, i, 'heldout_pair')
    assert icon_things.held_pair(*(MANY[t] for t in found.things))
    found = scene(EVAL, i, 'synonym')
    names = MANY[found.things[0]].heldout
    said = found.caption.lower()
    assert any(name.lower() in said for name in names)
  with pytest.raises(ValueError):
    scene(TRAIN, 0, 'synonym')


def test_a_held_out_name_that_another_thing_has_is_dropped(folder):
  sets = read_sets(folder)
  (car,) = [t for t in icon_things.choose(sets, sets, None) if t.name == 'car']
  assert car.heldout == ('automobile',)
  cab = {'1f696': 'oncoming automobile'}
  more = [
    s.__class__(
      s.style,
      s.licence,
      {**s.images, **dict.fromkeys(cab, b'')},
      {**s.names, **cab} if s.names else {},
    )
    for s in sets
  ]
  (car,) = [t for t in icon_things.choose(more, more, None) if t.name == 'car']
  assert car.heldout == ()


def test_most_things_lose_no_style_and_every_thing_keeps_one():
  held = [icon_things.held_style(thing, ('3D', 'flat')) for thing in MANY]
  assert 0.1 < np.mean([style is not None for style in held]) < 0.3
  assert {'3D', 'flat'} <= set(held)
  assert icon_things.held_style(MANY[0], ('3D',)) is None


@pytest.mark.parametrize(
  'one, many, phrase',
  [
    ('fox', 'foxes', 'a fox'),
    ('mug of beer', 'mugs of beer', 'a mug of beer'),
    ('temple with columns', 'temples with columns', 'a temple with columns'),
    ('strawberry', 'strawberries', 'a strawberry'),
    ('knife', 'knives', 'a knife'),
    ('orange', 'oranges', 'an orange'),
    ('unicorn', 'unicorns', 'a unicorn'),
    ('hourglass', 'hourglasses', 'an hourglass'),
    ('grapes', 'grapes', 'grapes'),
    ('ball of yarn', 'balls of yarn', 'a ball of yarn'),
    ('popcorn', 'popcorn', 'popcorn'),
    ('computer mouse', 'computer mice', 'a computer mouse'),
    ('skis', 'skis', 'skis'),
    ('snowman', 'snowmen', 'a snowman'),
    ('fork and knife', 'fork and knife', 'fork and knife'),
    ('sun over hills', 'suns over hills', 'a sun over hills'),
    ('face in clouds', 'faces in clouds', 'a face in clouds'),
    ('euro banknote', 'euro banknotes', 'a euro banknote'),
    ('one piece swimsuit', 'one piece swimsuits', 'a one piece swimsuit'),
    ('x ray', 'x rays', 'an x ray'),
  ],
)
def test_names_have_plurals_and_articles(one, many, phrase):
  assert icon_things.plural(one) == many
  bare = icon_things.is_plural(one)
  assert (one if bare else f'{icon_things.article(one)} {one}') == phrase


def test_a_prepared_set_is_of_its_styles_and_things(folder):
  source = {'kind': 'icons', 'path': str(folder), 'split': 'train'}
  headers = []
  for more in ({}, {'styles': ['flat', '3D']}, {'things': 2}):
    spec = shards.Spec({**source, **more}, 32, number=100)
    spec, found = shards.plan(spec, max_bad=0)
    assert sum(shard.stop - shard.start for shard in found) == 100
    headers.append(json.dumps(spec.header()))
  assert len(set(headers)) == 3
