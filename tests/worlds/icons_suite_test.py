"""The icons suite and its judge, with colours as features."""

import copy
import dataclasses

import numpy as np
import pytest

from imagen_jax.cli import evaluate as command_line
from imagen_jax.data import claim, shards
from imagen_jax.errors import UsageError
from imagen_jax.evaluation import report
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.extractors import Extractor
from imagen_jax.io import model_folder
from imagen_jax.worlds import icon_scenes, icons, icons_judge, icons_suite
from imagen_jax.worlds.icon_scenes import CATEGORIES
from imagen_jax.worlds.icons_suite import IconsSuite
from tests.evaluation.runs import finish
from tests.worlds import tiny_icons

COLOURS = np.array([colour for _, colour in tiny_icons.THINGS.values()])


def features(images):
  """Which colours an image has, and how much of it is filled."""
  return np.stack([_features(np.asarray(image)) for image in images])


def _features(image):
  near = np.abs(image[::4, ::4, None].astype(int) - COLOURS).max(-1) < 25
  mask = near.any(-1)
  has = near.mean((0, 1)) > 0.01
  return np.array([*has, mask.mean()], np.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
  folder = tiny_icons.write(tmp_path_factory.mktemp('icons'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(folder / 'cache'))
    patch.setattr(icons_judge, 'LOOKS', 20)
    source = icons.IconsSource(
      folder, 64, styles=('3D', 'flat'), split='eval', seed=2205
    )
    extractor = Extractor(features, 'e' * 64, 'none')
    categories = ('single', 'count', 'pair')
    made = IconsSuite(source, extractor, categories, 20)
    assert made.judge_of_renders  # fitted here, with so many renders
  return made


def test_true_images_are_right_and_those_of_other_prompts_wrong(
  suite, tmp_path
):
  found = finish(tmp_path, suite, lambda item: suite.true_image(item, 64))
  right, own = found['icons'], found['judge']
  for name in ('single', 'single_top5', 'style', 'pair'):
    assert right[name]['accuracy'] >= 0.9, name
    assert right[name]['accuracy'] == own[name]['accuracy']
    assert right[name]['judge'] == own[name]['accuracy']
  assert right['count']['accuracy'] >= 0.9
  assert right['distance']['n_real'] == 2 * right['distance']['n'] == 120
  near, floor = (
    right['distance'][key]
    for key in ('FD-EffLite0', 'FD-EffLite0 real_against_real')
  )
  assert near < 3 * floor
  first = suite.items()[0]
  same = lambda item: suite.true_image(first, 64)
  wrong = finish(tmp_path, suite, same, 'steps=1')['icons']
  assert wrong['single']['accuracy'] < 0.5 and wrong['pair']['accuracy'] == 0
  assert wrong['distance']['FD-EffLite0'] > 3 * near
  page = report.write(tmp_path).read_text()
  assert page.count('class="mark"') >= 5 and 'FD-EffLite0' in page


def test_true_images_are_not_given_to_the_network_again(suite, tmp_path):
  """Neither those that the probe is fitted to, nor those that are scored."""
  asked = []

  def counted(images):
    images = list(images)
    asked.append(len(images))
    return features(images)

  few = dataclasses.replace(
    suite, num=5, extractor=Extractor(counted, 'f' * 64, 'none')
  )
  true = lambda item: suite.true_image(item, 64)
  first = finish(tmp_path, few, true)
  before, generated = sum(asked), 5 + 2 * 5 + 15  # a pair has two parts
  asked.clear()
  again = dataclasses.replace(few)
  assert finish(tmp_path, again, true, 'steps=1') == first
  assert sum(asked) == generated < before / 4
  other = dataclasses.replace(few, extractor=Extractor(counted, '0' * 64, ''))
  asked.clear()
  finish(tmp_path, other, true, 'steps=2')
  assert sum(asked) == before


def test_the_digest_is_of_every_scene_that_is_scored(suite, monkeypatch):
  before = suite.digest()
  assert dataclasses.replace(suite, num=10).digest() == before
  original = icon_scenes.scene

  def changed(world, i, category=None):
    made = original(world, i, category)
    if category != 'synonym' and category != 'pair':
      return made
    return dataclasses.replace(made, caption=f'{made.caption} too')

  monkeypatch.setattr(icons, 'scene', changed)
  assert suite.digest() != before


def test_the_distance_is_from_scenes_of_the_same_categories(suite, monkeypatch):
  asked = []
  original = icon_scenes.scene

  def counted(world, i, category=None):
    asked.append(category)
    return original(world, i, category)

  monkeypatch.setattr(icons, 'scene', counted)
  blank = np.zeros((64, 64, 3), np.uint8)
  found = suite._distance({'single': [blank] * 5, 'pair': [blank] * 4})
  assert (found['n'], found['n_real']) == (9, 18)
  assert (asked.count('single'), asked.count('pair'), len(asked)) == (
    15,
    12,
    27,
  )


def test_one_style_has_no_score(suite):
  source = copy.copy(suite.source)
  source.world = dataclasses.replace(source.world, styles=('3D',), looks=None)
  one = dataclasses.replace(suite, source=source)
  scenes = [one.scene(item) for item in one.items()[:3]]
  images = [source.render(scene) for scene in scenes]
  assert {*one._verdicts('single', scenes, images, suite.judge_of_renders)} == {
    'single',
    'single_top5',
  }


def test_a_mirrored_pair_is_right_unless_the_prompt_has_a_relation(suite):
  items = [i for i in suite.items() if i.category == 'pair']
  images = [suite.true_image(i, 64)[:, ::-1] for i in items]
  shown = [suite.scene(i) for i in items]
  found = suite._verdicts('pair', shown, images, suite.judge_of_renders)['pair']
  for verdict, scene in zip(found, shown):
    assert verdict == (scene.relation not in ('left of', 'right of'))


def test_parts_are_cut_at_the_widest_gap():
  mask = np.zeros((10, 12), bool)
  mask[2:8, 1:3] = mask[2:8, 4:6] = mask[3:6, 9:11] = True
  first, second, across = icons_judge.halves(mask)
  assert across and first[:, :6].sum() == 24 and second[:, 9:].sum() == 6
  assert not first[:, 7:].any() and not second[:, :8].any()
  first, second, across = icons_judge.halves(mask.T)
  assert not across and first[:6].sum() == 24 and second[9:].sum() == 6
  whole = icons_judge.halves(np.ones((4, 4), bool))
  assert [part.sum() for part in whole[:2]] == [8, 8]


def test_pieces_of_a_thing_are_not_counted():
  image = np.zeros((100, 100, 3), np.uint8)
  image[10:30, 10:30] = image[60:90, 50:80] = 255
  image[62:70, 84:90] = 255  # 4 pixels beside the second
  image[5:9, 70:74] = 255  # far away, and small
  assert icons_judge.count(image) == 2
  assert icons_judge.count(np.zeros((20, 20, 3), np.uint8)) == 0


def test_a_crop_does_not_depend_on_size_and_place():
  image = np.full((64, 64, 3), 200, np.uint8)
  image[10:26, 30:46] = (255, 0, 0)
  image[10:18, 30:38] = (0, 0, 255)
  other = np.full((64, 64, 3), 200, np.uint8)
  other[20:52, 5:37] = image[10:26, 30:46].repeat(2, 0).repeat(2, 1)
  a, b = (
    icons_judge.crop(x, icons_judge.foreground(x)) for x in (image, other)
  )
  assert a.shape == (224, 224, 3)
  assert np.abs(a.astype(int) - b).mean() < 10  # of 255
  empty = np.zeros((8, 8, 3), np.uint8)
  assert not icons_judge.crop(empty, icons_judge.foreground(empty)).any()


def test_a_probe_separates_what_a_line_can_separate():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 200)
  x = rng.normal(size=(200, 5)) * 0.1 + np.eye(3, 5)[labels]
  probe = icons_judge.Probe.fit(x, labels, 3)
  assert (probe(x).argmax(1) == labels).all()
  # Of one feature without noise: least squares through both means.
  one = icons_judge.Probe.fit(np.array([[0.0], [2.0]]), [0, 1], 2)
  expected = np.array([[-1, 1]]) / (2 * (1 + icons_judge.RIDGE))
  np.testing.assert_allclose(one.weights, expected)


@pytest.mark.parametrize(
  'kind, options, key',
  [
    ('shapes', {'efficientnet': 'w.safetensors'}, 'suite'),
    ('icons', {}, 'efficientnet'),
  ],
)
def test_the_suite_needs_a_model_of_icons_and_the_networks_weights(
  monkeypatch, kind, options, key
):
  record = model_folder.StageRecord(None, {'data': {'kind': kind}}, {})
  monkeypatch.setattr(model_folder, 'find_stages', lambda *_: [record])
  with pytest.raises(UsageError) as error:
    icons.IconsSource.suite(EvalConfig(model='m', **options))
  assert error.value.key == key


def test_a_model_of_a_prepared_set_is_judged_by_the_sets_settings(
  suite, tmp_path, monkeypatch
):
  packages = tiny_icons.write(tmp_path)
  source = {'kind': 'icons', 'path': str(packages), 'styles': ['flat']}
  spec = shards.Spec({**source, 'split': 'train', 'things': 3}, 32, number=9)
  claim.claim(tmp_path / 'set', *shards.plan(spec, max_bad=0))
  data = {'kind': 'arrayrecord', 'path': str(tmp_path / 'se*')}
  config = {'data': data, 'stage': {'resolution': 32}}
  record = model_folder.StageRecord(None, config, {})
  monkeypatch.setattr(model_folder, 'find_stages', lambda *_: [record])
  monkeypatch.setattr(
    icons_suite, 'load_efficientnet', lambda path: suite.extractor
  )
  asked = {'model': 'm', 'efficientnet': 'w'}
  made = IconsSuite.from_config(EvalConfig(data=packages, **asked))
  assert made.source.world.styles == ('flat',) and made.num == 300
  assert len(made.source.world.things) == 3 and made.source.size == 32
  # There is one style, and no pair of the three is held out.
  assert made.categories == ('single', 'count', 'pair', 'synonym')
  with pytest.raises(UsageError) as error:
    IconsSuite.from_config(EvalConfig(**asked))
  assert error.value.key == 'data'


def test_all_categories_have_their_scenes(suite):
  assert set(suite.categories) < set(CATEGORIES)
  digest = suite.digest()
  assert len(digest) == 16 and suite.num == 20


def test_the_command_line_prints_the_judges_accuracy_beside_a_score(capsys):
  score = {'accuracy': 0.5, 'n': 4, 'ci95': [0.15, 0.85], 'judge': 0.97}
  command_line._Console().scored('icons', {'single': score})
  (line,) = capsys.readouterr().out.splitlines()[1:]
  assert line.split()[:3] == ['single', '50.0', '%'] and '97.0 %' in line
