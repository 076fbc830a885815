"""A finished stage becomes the teacher of one with fewer steps."""

import json
import shutil

import jax
import numpy as np
import pytest

import imagen_jax
from imagen_jax.cli.configs import load_config
from imagen_jax.errors import ImagenError, ModelError, UsageError
from imagen_jax.io import model_folder
from imagen_jax.training import loop
from imagen_jax.training.distillation import DistillExperiment
from imagen_jax.training.experiment import Export, make_experiment

SHORT = (
  'dtype=float32', 'mesh.data=2', 'train.num_steps=2', 'train.batch_size=8',
  'train.log_every=1', 'train.sample_every=2', 'train.eval_every=None',
  'train.optimizer.warmup=0',
)  # fmt: skip


def distilled(teacher, *overrides):
  return load_config(f'distill:{teacher}', [*SHORT, *overrides])


def losses(config):
  """The losses of a batch with the teacher's own weights as the student's."""
  experiment = make_experiment(config)
  frozen = experiment.load_frozen()
  rng = np.random.default_rng(0)
  side, length = experiment.resolution, config.text.max_len
  ids = rng.integers(2, 20, (8, length), dtype=np.int32)
  batch = {
    'image': rng.integers(0, 256, (8, side, side, 3), dtype=np.uint8),
    'ids': ids,
    'mask': np.ones((8, length), bool),
  }

  @jax.jit
  def run(params, batch, frozen):
    key = jax.random.key(0)
    batch = experiment.condition(key, batch, frozen)
    return experiment.loss(params, key, batch, frozen)[0]

  return run(frozen['teacher'], batch, frozen)


def weighted(model, tmp_path):
  """A teacher that was trained with a weighting that has a number."""
  folder = shutil.copytree(model / 'base', tmp_path / 'weighted')
  record = json.loads((folder / 'stage.json').read_text())
  record['config']['stage'] |= {'weighting': 'sigmoid', 'sigmoid_bias': -3.0}
  (folder / 'stage.json').write_text(json.dumps(record))
  return folder


def test_the_config_takes_over_the_teachers(model, tmp_path):
  config = distilled(model / 'sr1')
  theirs = model_folder.load_stage(model / 'sr1').config
  assert config.stage.net.to_dict() == theirs['stage']['net']
  assert config.stage.low_resolution == 8
  assert config.text.path == theirs['text']['path']
  assert config.data.kind == 'shapes'
  assert (config.teacher.steps, config.teacher.guidance) == (2, 1.0)
  assert (config.stage.sampling.steps, config.stage.sampling.sampler) == (
    1, 'ddim',
  )  # fmt: skip
  stage = distilled(weighted(model, tmp_path)).stage
  assert (stage.weighting, stage.sigmoid_bias) == (None, 0.0)
  base = distilled(model / 'base', 'stage.sampling.steps=3')
  assert (base.teacher.steps, base.teacher.guidance) == (3, 2.0)
  assert (base.stage.sampling.steps, base.stage.sampling.guidance) == (3, 1.0)


@pytest.mark.parametrize('name', ['base', 'sr1'])
def test_without_guidance_and_fewer_steps_the_teacher_is_the_student(
  model, name
):
  same = (
    'teacher.steps=4',
    'stage.sampling.steps=4',
    'teacher.guidance=1',
    'stage.sampling.threshold=none',
  )
  np.testing.assert_allclose(
    losses(distilled(model / name, *same)), 0, atol=1e-9
  )
  changes = {
    'base': ['teacher.guidance=3', 'teacher.steps=8'],
    'sr1': ['teacher.guidance=3'],
  }
  for change in changes[name]:
    more = losses(distilled(model / name, *same, change))
    assert np.median(more) > 1e-4


def test_a_student_is_trained_sampled_and_a_teacher_in_its_turn(
  model, tmp_path
):
  (tmp_path / 'text').symlink_to(model / 'text')
  config = distilled(
    model / 'base', 'teacher.steps=4', 'stage.sampling.steps=2'
  )
  work = tmp_path / 'base'
  assert loop.train(config, work) == 2
  assert (work / 'samples/step_0000002.png').exists()
  weights, teacher = (
    model_folder.load_params(model_folder.load_stage(folder))
    for folder in (work, model / 'base')
  )
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), weights, teacher)
  assert 0 < max(jax.tree.leaves(change)) < 0.01  # it starts from them
  cascade = imagen_jax.load(tmp_path)
  (settings,) = cascade.settings()
  assert (settings.steps, settings.sampler, settings.guidance) == (
    2, 'ddim', 1.0,
  )  # fmt: skip
  assert cascade.sample('a red circle')['base'].shape == (1, 8, 8, 3)
  again = distilled(work)
  assert (again.teacher.steps, again.stage.sampling.steps) == (2, 1)
  make_experiment(again)


def test_moments_are_matched_by_two_networks_of_which_one_is_kept(
  model, tmp_path
):
  (tmp_path / 'text').symlink_to(model / 'text')
  config = load_config(
    f'moments:{model / "base"}', [*SHORT, 'stage.sampling.steps=2']
  )
  work, out = tmp_path / 'base', tmp_path / 'out/base'
  assert loop.train(config, work) == 2
  assert (work / 'samples/step_0000002.png').exists()
  DistillExperiment.export(Export(work, out, dtype='float32'))
  teacher, *students = (
    model_folder.load_params(model_folder.load_stage(folder))
    for folder in (model / 'base', work, out)
  )
  jax.tree.map(np.testing.assert_array_equal, *students)
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), students[0], teacher)
  assert 0 < max(jax.tree.leaves(change)) < 0.01  # it starts from them
  cascade = imagen_jax.load(out.parent)
  (settings,) = cascade.settings()
  assert (settings.steps, settings.eta, settings.guidance) == (2, 1.0, 1.0)
  assert cascade.sample('a red circle')['base'].shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
  'overrides, key',
  [
    (['teacher.steps=5', 'stage.sampling.steps=2'], 'teacher.steps'),
    (['stage.sampling.guidance=2'], 'stage.sampling'),
    (['stage.sampling.sampler=ddpm'], 'stage.sampling'),
    (['stage.sampling.eta=0.5'], 'stage.sampling'),
    (['stage.weighting=sigmoid'], 'stage.weighting'),
    (['stage.weighting=min_snr'], 'stage.weighting'),
    (['stage.weighting=eps'], 'stage.weighting'),
    (['stage.prediction=eps', 'stage.sampling.steps=2'], 'stage.prediction'),
    (['stage.resolution=16'], 'stage.resolution'),
    (['text.max_len=7'], 'text.path'),
    (['teacher.path='], 'teacher.path'),
  ],
)
def test_what_does_not_go_together_is_refused(model, overrides, key):
  config = distilled(
    model / 'base', 'teacher.steps=2', 'stage.sampling.steps=1', *overrides
  )
  with pytest.raises(UsageError) as error:
    make_experiment(config)
  assert error.value.key == f'config.{key}'


def test_a_teacher_of_before_kinds_has_t5s(model, tmp_path):
  """And one that was trained on embeddings of another precision is no other."""
  folder = shutil.copytree(model / 'base', tmp_path / 'base')
  for change in {}, {'kind': 't5', 'store': 'int8'}:
    record = json.loads((folder / 'stage.json').read_text())
    for key in 'kind', 'store':
      record['text'].pop(key, None)
    record['text'] |= change
    (folder / 'stage.json').write_text(json.dumps(record))
    make_experiment(distilled(folder))


def test_a_teacher_that_cannot_be_read_is_refused(model, tmp_path):
  with pytest.raises(ImagenError):
    load_config(f'distill:{tmp_path}')
  config = distilled(model / 'base', 'stage.net.channels=4')
  with pytest.raises(ModelError):
    make_experiment(config).load_frozen()
