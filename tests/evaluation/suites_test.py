"""Choosing a suite from a config, and evaluating from Python."""

import dataclasses
import json

import numpy as np
import pytest

from imagen_jax.cascade.cascade import Cascade
from imagen_jax.data.source import Source
from imagen_jax.errors import UsageError
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.run import evaluate
from imagen_jax.evaluation.scores import accuracy
from imagen_jax.evaluation.suite import Suite, digest, number
from imagen_jax.evaluation.suites import make_suite
from imagen_jax.io.model_folder import StageRecord

FAST = {'steps': 1, 'guidance': 1, 'sampler': 'ddim'}


class Dark(Suite):
  """A user's own suite: is the image dark?"""

  label = 'dark'
  uses = ('num',)

  def __init__(self, num):
    self.num = num

  def heading(self):
    return 'Is it dark?', ''

  def items(self):
    return number([('all', 'a dark image')] * self.num)

  def digest(self):
    return digest('dark')

  def judge(self, item, image):
    return {'correct': bool(image.mean() < 127), 'aspects': {}}

  def score(self, folder, records):
    return {'dark': {'all': accuracy(r['correct'] for r in records.values())}}


class DarkSource(Source):
  def __len__(self):
    return 1

  def __getitem__(self, i):
    return {'image': np.zeros((8, 8, 3), np.uint8), 'caption': 'a dark image'}

  @classmethod
  def suite(cls, config):
    return Dark(config.num or 2)


class OtherSource(DarkSource):
  pass


def trained_on(*kinds):
  return [
    StageRecord(None, {'data': {'kind': kind}, 'stage': {'resolution': 8}}, {})
    for kind in kinds
  ]


DARK = 'tests.evaluation.suites_test:DarkSource'
OTHER = 'tests.evaluation.suites_test:OtherSource'


@pytest.mark.parametrize(
  'key, config',
  [
    ('num', {'num': 0}),
    ('num_images', {'num_images': 0}),
    ('batch_size', {'batch_size': 0}),
    ('shard', {'shard': (2, 2)}),
    ('sampling', {'sampling': {'strength': 0.5}}),
    ('sweep', {'sweep': {'sr1.width': (1, 2)}}),
  ],
)
def test_a_value_out_of_range_is_refused_by_its_key(key, config):
  with pytest.raises(UsageError) as error:
    EvalConfig(**config)
  assert error.value.key == key


def test_without_a_suite_it_is_that_of_the_models_data():
  assert make_suite(EvalConfig(num=3), trained_on(DARK, DARK)).num == 3


@pytest.mark.parametrize(
  'kinds', [('folder',), (DARK, OTHER)], ids=['none', 'several']
)
def test_a_model_without_a_suite_of_its_own_needs_one_named(kinds):
  with pytest.raises(UsageError) as error:
    make_suite(EvalConfig(), trained_on(*kinds))
  assert error.value.key == 'suite'


def test_an_unknown_suite_is_refused():
  with pytest.raises(UsageError):
    make_suite(EvalConfig(suite='promts'), trained_on(DARK))


@pytest.mark.parametrize(
  'key, config',
  [
    ('prompts', {'suite': DARK, 'prompts': 'p.txt'}),
    ('from_truth', {'suite': DARK, 'from_truth': True}),
    ('clip', {'suite': 'prompts', 'prompts': 'p.txt', 'clip': 'a'}),
    ('prompts', {'suite': 'clip', 'clip': 'a'}),
    ('clip', {'suite': 'clip', 'prompts': 'p.txt'}),
    ('data', {'suite': 'fid'}),
    ('inception', {'suite': 'fid', 'data': 'a'}),
  ],
)
def test_an_option_without_effect_or_missing_is_refused_by_its_key(
  key, config, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'p.txt').write_text('a cat\n')
  with pytest.raises(UsageError) as error:
    make_suite(EvalConfig(**config), trained_on(DARK))
  assert error.value.key == key


def test_a_users_suite_is_evaluated_from_python(model, tmp_path, capsys):
  config = EvalConfig(
    suite=DARK, model=model, out=tmp_path, stages=('base',), sampling=FAST
  )
  result = evaluate(config)
  assert list(result.scores) == ['dark']
  assert result.scores['dark']['all']['n'] == 2
  found = json.loads((tmp_path / 'scores.json').read_text())
  assert found['dark'] == result.scores['dark']
  assert result.report == tmp_path / 'index.html'
  assert capsys.readouterr().out == ''


def test_a_sweep_makes_all_combinations(model, tmp_path):
  config = EvalConfig(
    suite=DARK,
    model=model,
    out=tmp_path,
    num=1,
    sampling=FAST,
    # One compiled program for all: guidance and level are traced.
    sweep={'aug_level': (0, 0.1), 'base.guidance': (2.0, 3)},
  )
  assert list(evaluate(config).scores) == [
    f'dark@aug_level={level},base.guidance={w}'
    for level in ('0', '0.1')
    for w in (2, 3)
  ]
  notes = json.loads((tmp_path / 'scores.json').read_text())['provenance']
  last = notes['dark@aug_level=0.1,base.guidance=3']['stages']
  assert last['base']['guidance'] == 3 and last['sr1']['guidance'] == 1
  assert last['sr1']['aug_level'] == 0.1


def test_guidance_of_any_kind_can_be_evaluated(model, tmp_path, monkeypatch):
  from tests import tiny_model

  sample, given = Cascade.sample, []

  def spy(self, *args, **options):
    given.append(options['negative_prompt'])
    return sample(self, *args, **options)

  monkeypatch.setattr(Cascade, 'sample', spy)
  weak = tiny_model.write_weak(tmp_path / 'weak', model)
  config = EvalConfig(
    suite=DARK,
    model=model,
    out=tmp_path / 'out',
    num=1,
    stages=('base',),
    negative_prompt='a star',
    weak_model=weak,
    sampling={'steps': 1, 'autoguidance': 2.0},
    sweep={'guidance_interval': ('none', (-99.0, 99.0))},
  )
  points = list(evaluate(config).scores)
  assert given == ['a star'] * 2
  assert points == [f'dark@guidance_interval={v}' for v in ('none', '-99:99')]
  notes = json.loads((tmp_path / 'out' / 'scores.json').read_text())
  notes = notes['provenance'][points[1]]
  assert notes['stages']['base']['guidance_interval'] == [-99, 99]
  assert notes['negative_prompt'] == 'a star' and notes['weak_digest']
  for key, change in (
    ('weak_model', {'sampling': {}}),
    ('negative_prompt', {'sampling': {'guidance': 1.0, 'autoguidance': 2.0}}),
  ):
    with pytest.raises(UsageError) as error:
      evaluate(dataclasses.replace(config, out=tmp_path / key, **change))
    assert error.value.key == key


def test_a_sweep_of_an_unknown_stage_is_refused(model, tmp_path):
  with pytest.raises(UsageError) as error:
    evaluate(
      EvalConfig(
        suite=DARK, model=model, out=tmp_path, sweep={'sr7.steps': (1,)}
      )
    )
  assert error.value.key == 'sweep'
  assert not (tmp_path / 'dark').exists()


def test_the_process_that_finishes_last_writes_the_scores(model, tmp_path):
  def part(i):
    return evaluate(
      EvalConfig(
        suite=DARK,
        model=model,
        out=tmp_path,
        stages=('base',),
        sampling=FAST,
        shard=(i, 2),
      )
    )

  first = part(1)
  assert first.scores == {} and first.report is None
  assert not (tmp_path / 'scores.json').exists()
  assert part(0).scores['dark']['all']['n'] == 2
