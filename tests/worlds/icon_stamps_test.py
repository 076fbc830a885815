"""Photos in the icons world, on stamps of one colour each."""

import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import shards
from imagen_jax.errors import UsageError
from imagen_jax.evaluation.extractors import Extractor
from imagen_jax.worlds import icon_stamps, icon_things, icons, icons_judge
from imagen_jax.worlds.icon_scenes import CATEGORIES
from imagen_jax.worlds.icon_sets import read_sets
from imagen_jax.worlds.icons_suite import IconsSuite
from tests.worlds import tiny_icons
from tests.worlds.icons_suite_test import features

MAMMALS = 'animals/mammals'
STAMPS = {  # file: (caption, colour)
  f'{MAMMALS}/dogs/dog': ('A dog.\nde.utf8=Ein Hund.', (250, 0, 0)),
  f'{MAMMALS}/dogs/fox': ('A fox!', (0, 0, 250)),
  'vehicles/auto/beetle': ('A VW Beetle.', (160, 0, 160)),
  'plants/flowers/rose': ('A rose.', (0, 150, 150)),
  'animals/birds/owl': ('An owl.', (1, 2, 3)),  # a thing of no set
  f'{MAMMALS}/hedgehog': ('A dog.', (9, 9, 9)),  # a drawing
  f'{MAMMALS}/cats/lion': ('A cat.', (0, 160, 0)),
  f'{MAMMALS}/cats/lion-2': ('A cat.', (0, 250, 0)),
}
GREENS = [(0, 160, 0), (0, 250, 0)]
ALLOWED = ('MIT', 'CC-BY-4.0')


def png(colour):
  """A square of a colour in a transparent image."""
  image = Image.new('RGBA', (60, 60), (0, 0, 0, 0))
  image.paste((*colour, 255), (10, 10, 50, 50))
  data = io.BytesIO()
  image.save(data, 'PNG')
  return data.getvalue()


def write_stamps(folder):
  for stamp, (caption, colour) in STAMPS.items():
    path = folder / f'{stamp}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))
    path.with_suffix('.txt').write_text(caption)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  found = tiny_icons.write(tmp_path_factory.mktemp('stamps'))
  write_stamps(found / 'unpacked/usr/share/tuxpaint/stamps')
  return found


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp()))


def source(folder, styles=('photo', 'flat'), size=64, **options):
  return icons.IconsSource(folder, size, styles=styles, **options)


def photos(folder):
  (found,) = icon_stamps.read_stamps(
    folder, icon_things.by_name(read_sets(folder))
  )
  return found


def test_captions_and_the_list_name_the_photos(folder):
  found = photos(folder)
  names = icon_things.names_of(read_sets(folder))
  shown = {names[code]: found.of(code) for code in found.images}
  assert shown == {
    'dog': (png((250, 0, 0)),),
    'fox': (png((0, 0, 250)),),
    'automobile': (png((160, 0, 160)),),
    'rose': (png((0, 150, 150)),),
    'cat': tuple(map(png, GREENS)),
  }
  assert (found.style, found.licence) == ('photo', 'GPL-2.0-or-later')


@pytest.mark.parametrize(
  'caption, name',
  [
    ('A fox.', 'fox'),
    ('An owl!', 'owl'),
    ('A pair of scissors.', 'scissors'),
    ('The Earth. Our planet!', 'earth. our planet'),
    ('Avocado', 'avocado'),
  ],
)
def test_a_caption_loses_its_article_and_its_full_stop(caption, name):
  assert icon_stamps.named(caption) == name


@pytest.mark.parametrize(
  'place', ['stamps', 'tuxpaint/stamps', 'usr/share/tuxpaint/stamps']
)
def test_stamps_are_found_linked_or_unpacked(folder, tmp_path, place):
  sets = read_sets(tiny_icons.write(tmp_path))
  assert icon_stamps.read_stamps(tmp_path, icon_things.by_name(sets)) == []
  path = tmp_path / place
  path.parent.mkdir(parents=True, exist_ok=True)
  path.symlink_to(folder / 'unpacked/usr/share/tuxpaint/stamps')
  assert photos(tmp_path) == photos(folder)


def test_everyday_names_go_before_synonyms(folder):
  sets = read_sets(folder)
  more = [
    dataclasses.replace(
      s, names=dict(s.names) | {'1f429': 'hound'} if s.names else {}
    )
    for s in sets
  ]
  assert icon_things.by_name(sets)['hound'] == '1f415'  # the dog
  assert icon_things.by_name(more)['hound'] == '1f429'
  assert icon_things.by_name(sets)['automobile'] == '1f697'


def test_photos_leave_the_scenes_of_other_styles_as_they_were(folder, tmp_path):
  plain = tiny_icons.write(tmp_path)
  for options in ({'styles': ('3D', 'flat')}, {'licences': ALLOWED}):
    for split in ('train', 'eval'):
      ours, other = (
        icons.IconsSource(path, 32, split=split, **options)
        for path in (folder, plain)
      )
      assert ours.fingerprint == other.fingerprint
      assert ours.world.looks is None  # as before there were photos
      for i in range(50):
        assert ours.scene(i) == other.scene(i)
        assert (ours[i]['image'] == other[i]['image']).all()


def test_photos_need_their_licence(folder):
  assert 'photo' in icons.IconsSource(folder, 32).world.styles
  with pytest.raises(UsageError) as error:
    source(folder, licences=ALLOWED)
  assert error.value.key == 'config.data.styles'
  allowed = source(folder, licences=(*ALLOWED, 'GPL-2.0-or-later'))
  assert allowed.world.styles == ('photo', 'flat')


def test_photos_show_some_of_the_things_that_the_other_styles_show(folder):
  mixed, plain, alone = (
    source(folder, styles)
    for styles in (('photo', 'flat'), ('flat',), ('photo',))
  )
  assert [t.code for t in mixed.world.things] == [
    t.code for t in plain.world.things
  ]
  names = [thing.name for thing in mixed.world.things]
  assert names == ['dog', 'cat', 'fox', 'rose', 'car', 'red heart']
  assert mixed.world.looks == ((1, 2, 1, 1, 1, 0), (1,) * 6)
  assert [t.name for t in alone.world.things] == names[:-1]
  styles = {found.style for found in map(mixed.scene, range(50))}
  assert styles == {0, 1}
  heart = names.index('red heart')
  for found in map(mixed.scene, range(300)):
    assert found.style or heart not in found.things
  with pytest.raises(UsageError) as error:
    source(folder, things=3)  # photos of three things are too few
  assert error.value.key == 'config.data.things'


def test_each_of_several_photos_of_a_thing_is_shown(folder):
  world = source(folder)
  cat = [thing.name for thing in world.world.things].index('cat')
  seen, mixed = set(), False
  for i in range(400):
    found = world.scene(i)
    assert len(found.looks) == len(found.things)
    if found.style or cat not in found.things:
      assert found.style == 0 or set(found.looks) == {0}
      continue
    image = world.render(found)
    mixed |= {0, 1} <= set(found.looks)
    for thing, look, (x, y, _) in zip(found.things, found.looks, found.places):
      if thing == cat:
        at = image[int(64 * y), int(64 * x)]
        np.testing.assert_allclose(at, GREENS[look], atol=3)
        seen.add(look)
  assert seen == {0, 1} and mixed  # also of several cats in one image


def test_captions_call_photos_photos_and_nothing_else(folder):
  ways = set()
  for split, category in [('train', None), *(('eval', c) for c in CATEGORIES)]:
    world = source(folder, split=split)
    if split == 'eval' and category not in world.categories():
      continue
    for i in range(300):
      found = world.scene(i, category)
      said = found.caption.lower()
      if found.style:
        assert 'photo' not in said
      else:
        assert not re.search('drawing|icon|flat|style', said), said
        assert not re.search('a photo [^o]', said.rstrip('.')), said
        ways |= set(re.findall('^a photo(?:graph)? of|, photo', said))
  assert ways == {'a photo of', 'a photograph of', ', photo'}


def test_a_style_is_held_out_only_of_things_that_it_shows(folder):
  base = source(folder, split='eval').world
  many = tuple(
    dataclasses.replace(base.things[0], name=f'thing {i}') for i in range(200)
  )
  looks = ((1, 0) * 100, (1,) * 200)
  world = dataclasses.replace(base, things=many, looks=looks)
  assert {held for held in world.held[1::2]} == {None}  # one style is left
  assert set(world.held[::2]) == {None, 'photo', 'flat'}
  for style, name in enumerate(world.styles):
    assert all(
      looks[style][t] and world.held[t] != name for t in world.free[style]
    )


def test_the_judge_sees_every_photo_at_both_sizes(folder, monkeypatch):
  monkeypatch.setattr(icons_judge, 'LOOKS', 2)
  world = source(folder, split='eval').world
  seen = {}
  for found in icons_judge.training_scenes(world):
    key = (found.style, found.things[0])
    seen.setdefault(key, []).append(found.looks[0])
  assert seen.pop((0, 1)) == [0, 0, 1, 1]  # the cat
  assert len(seen) == 10 and set(map(tuple, seen.values())) == {(0, 0)}


def test_the_judge_knows_the_things_of_photos(folder, monkeypatch):
  monkeypatch.setattr(icons_judge, 'LOOKS', 10)
  world = source(folder, ('3D', 'photo'), split='eval', seed=2205)
  extractor = Extractor(features, 'e' * 64, 'none')
  suite = IconsSuite(world, extractor, ('single',), 20)
  names = [thing.name for thing in world.world.things]
  missing = 2 * names.index('red heart') + 1  # a photo that does not exist
  assert not suite.judge_of_renders.probe.weights[:, missing].any()
  items = suite.items()
  assert {suite.scene(item).style for item in items} == {0, 1}
  true = [suite.true_image(item, 64) for item in items]
  assert (
    suite._accuracies(items, true, suite.judge_of_renders)['single']['accuracy']
    >= 0.8
  )


def test_a_prepared_set_has_photos_if_their_style_is_asked_for(folder):
  where = {'kind': 'icons', 'path': str(folder), 'split': 'train'}
  spec = shards.Spec({**where, 'styles': ['photo', 'flat']}, 32, number=100)
  spec, found = shards.plan(spec, max_bad=0)
  assert sum(shard.stop - shard.start for shard in found) == 100
