"""Emoji scenes, with a test font of four coloured squares."""

import importlib.util
import pathlib

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError
from imagen_jax.worlds import captions, emoji, glyphs, tasks

JUDGE = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'emoji_judge.py'
COLOURS = {
  'dog': (1.0, 0.0, 0.0),
  'cat': (0.0, 0.6, 0.0),
  'rocket': (0.0, 0.0, 1.0),
  'sheep': (0.6, 0.0, 0.6),
}


def square(left, right):
  pen = TTGlyphPen(None)
  pen.moveTo((left, 0))
  pen.lineTo((left, 800))
  pen.lineTo((right, 800))
  pen.lineTo((right, 0))
  pen.closePath()
  return pen.glyph()


@pytest.fixture(scope='module')
def font(tmp_path_factory):
  """A font with glyphs for four of the things, each a coloured square."""
  build = FontBuilder(1000, isTTF=True)
  names = ['.notdef', *COLOURS]
  build.setupGlyphOrder(names)
  build.setupCharacterMap({ord(emoji.THINGS[n]): n for n in COLOURS})
  build.setupGlyf(
    {n: square(100, 300 if n == '.notdef' else 900) for n in names}
  )
  build.setupHorizontalMetrics({n: (1000, 100) for n in names})
  build.setupHorizontalHeader(ascent=800, descent=-200)
  build.setupNameTable({'familyName': 'Squares', 'styleName': 'Regular'})
  build.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
  build.setupPost()
  build.setupCPAL([[(*rgb, 1.0) for rgb in COLOURS.values()]])
  build.setupCOLR({n: [(n, i)] for i, n in enumerate(COLOURS)})
  path = tmp_path_factory.mktemp('font') / 'squares.ttf'
  build.save(path)
  return path


def test_things_the_font_lacks_are_left_out(font):
  source = emoji.EmojiSource(font, 64)
  assert source.names == tuple(sorted(COLOURS))


def test_an_image_shows_the_things_where_the_scene_says(font):
  source = emoji.EmojiSource(font, 64, split='eval')
  for i in range(20):
    image = source[i]['image'].astype(float)
    assert image.shape == (64, 64, 3)
    scene = emoji.scene(0, 'eval', i, source.names)
    assert scene.caption == source[i]['caption']
    for name, x, y, diameter in scene.things:
      colour = 255 * np.array(COLOURS[name])
      np.testing.assert_allclose(
        image[int(64 * y), int(64 * x)], colour, atol=3
      )
      assert 0.1 < diameter <= 0.7
    np.testing.assert_allclose(
      image[0, 0], emoji.BACKGROUND[scene.background], atol=1
    )


def test_the_judge_reads_true_images_and_no_others(font):
  spec = importlib.util.spec_from_file_location('emoji_judge', JUDGE)
  judge = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(judge)
  source = emoji.EmojiSource(font, 128, split='eval')
  reader = judge.Reader(source.glyphs)
  scenes = [emoji.scene(0, 'eval', i, source.names) for i in range(30)]
  for i, scene in enumerate(scenes):
    assert reader.correct(source[i]['image'], scene.meaning), scene.caption
  wrong = [
    reader.correct(source[i]['image'], scene.meaning)
    for i, scene in enumerate(scenes[1:])
  ]
  assert sum(wrong) <= 1
  assert not reader.correct(source[0]['image'] * 0 + 255, scenes[0].meaning)


def test_captions_say_what_is_there():
  names = tuple(sorted(COLOURS))
  seen = set()
  for i in range(400):
    scene = emoji.scene(3, 'train', i, names)
    caption, things = scene.caption, scene.things
    found = {name for name, *_ in things}
    for name in names:
      said = name in caption or emoji.plural(name) in caption
      assert said == (name in found), caption
    assert len(found) < 2 or not emoji.held_out(*found)
    if 'left of' in caption and len(found) == 2:
      seen.add('left of')
      before = caption.split(' left of ')[0].split(' to the')[0]
      a = [x for n, x, *_ in things if n in before or emoji.plural(n) in before]
      b = [
        x
        for n, x, *_ in things
        if not (n in before or emoji.plural(n) in before)
      ]
      assert max(a) < min(b), caption
    seen |= {word for word in ('two', 'five', 'background') if word in caption}
  assert seen == {'left of', 'two', 'five', 'background'}


def test_held_out_pairs_come_in_eval_only():
  names = tuple(sorted(emoji.THINGS))
  assert len(names) == 56
  pairs = {
    split: {
      frozenset(name for name, *_ in emoji.scene(0, split, i).things)
      for i in range(1500)
    }
    for split in ('train', 'eval')
  }
  held = {
    split: [p for p in found if len(p) == 2 and emoji.held_out(*p)]
    for split, found in pairs.items()
  }
  assert not held['train'] and len(held['eval']) > 40


def test_scenes_are_pure_and_splits_differ(font):
  options = {'kind': 'emoji', 'path': str(font), 'size': 32}
  first, again = make_source(**options), make_source(**options)
  np.testing.assert_array_equal(first[7]['image'], again[7]['image'])
  assert first.fingerprint == again.fingerprint
  other = make_source(**options, split='eval')
  assert [first[i]['caption'] for i in range(9)] != [
    other[i]['caption'] for i in range(9)
  ]
  with pytest.raises(IndexError):
    first[-1]


def test_a_missing_or_broken_font_is_a_data_error(tmp_path, monkeypatch):
  monkeypatch.setattr(glyphs, 'PLACES', (str(tmp_path),))
  with pytest.raises(DataError):
    emoji.EmojiSource(None, 64)
  (tmp_path / 'x.ttf').write_text('no font')
  with pytest.raises(DataError):
    emoji.EmojiSource(tmp_path / 'x.ttf', 64)


@pytest.mark.parametrize('name', ['emoji_base', 'emoji_sr256'])
def test_the_configs_make_networks(name):
  from imagen_jax.cascade import stage as stages
  from imagen_jax.cascade import stage_config
  from imagen_jax.cli.configs import load_config

  config = load_config(name)
  stage = stage_config.from_config(
    config.stage.to_dict(), text_dim=768, text_len=64
  )
  count = stages.num_params(stages.param_shapes(stage))
  assert 10e6 < count < 150e6


class Words:
  """A tokenizer with one piece per word."""

  def pieces(self, text):
    return text.split()


def test_names_are_found_in_captions():
  meaning = captions.Meaning(
    (captions.Group('tree', None, 2), captions.Group('palm tree', None))
  )
  caption = 'A palm tree to the right of two trees on a blue background'
  assert emoji.nouns(Words(), caption, meaning) == [(2, 1), (8, 0)]
  for i in range(300):
    scene = emoji.scene(5, 'train', i)
    found = emoji.nouns(Words(), scene.caption, scene.meaning)
    assert sorted(g for _, g in found) == list(range(len(scene.meaning.groups)))


def test_the_text_encoder_reads_these_captions():
  scenes = emoji.EmojiSource.scenes(0, 'eval', 40, heldout=True)
  assert len(scenes) == 40
  assert all(emoji.is_held_out(s.meaning) for s in scenes)
  scene = scenes[0]
  texts = [tasks.description(scene.meaning, g) for g in (0, 1)]
  for group, text in zip(scene.meaning.groups, texts):
    assert group.shape in text
    assert captions.NUMBERS[group.count - 1] in text
