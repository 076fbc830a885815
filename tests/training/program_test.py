"""The compiled step on disk: a later start of a run does not trace it."""

import copy
import itertools
import json

import jax
import numpy as np
import pytest

from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.nets.unet import UNet
from imagen_jax.training import loop
from imagen_jax.training import program as program_module
from imagen_jax.training.cpu_layout import LEAST_STEPS
from imagen_jax.training.experiment import make_experiment
from imagen_jax.training.stage_experiment import StageExperiment
from tests import tiny_model


@pytest.fixture(scope='module')
def config(model):
  config = tiny_model.config()
  config.text.path = str(model / 'text')
  config.train.update(num_steps=LEAST_STEPS, sample_every=None)
  return config


@pytest.fixture
def known(monkeypatch):
  """The tests' network counts as one whose code is known."""
  identity = lambda self: self.config.to_json_best_effort()
  monkeypatch.setattr(StageExperiment, 'identity', property(identity))


@pytest.fixture
def traced(monkeypatch):
  """Calls that trace a step."""
  calls, make = [], program_module.train_step

  def noted(*args, **options):
    step = make(*args, **options)

    def train_step(*arrays):
      calls.append(arrays)
      return step(*arrays)

    return train_step

  monkeypatch.setattr(program_module, 'train_step', noted)
  return calls


def start(config, workdir, steps=2):
  """Takes some steps; the parameters, the log and its rows."""
  count = itertools.count(1)
  loop.train(config, workdir, should_stop=lambda _: next(count) == steps)
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    params = checkpoints.restore_subtree('params')[0]
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return params, [json.loads(line) for line in lines]


def test_a_resumed_run_traces_nothing_and_is_the_uninterrupted_one(
  config, tmp_path, programs_folder, known, traced, capsys
):
  start(config, tmp_path / 'w')
  said, count = capsys.readouterr().out, len(traced)
  assert count and len(list(programs_folder.iterdir())) == 1
  params, rows = start(config, tmp_path / 'w')
  assert len(traced) == count
  flops = [line for line in said.splitlines() if 'FLOPs' in line]
  assert flops and flops[0] in capsys.readouterr().out
  whole, other = start(config, tmp_path / 'whole', steps=4)
  jax.tree.map(np.testing.assert_array_equal, params, whole)
  assert [row['loss'] for row in rows] == [row['loss'] for row in other]
  assert rows[3].keys() == other[3].keys()


def test_a_kept_step_takes_the_states_buffers(
  config, tmp_path, programs_folder, known
):
  start(config, tmp_path / 'w')
  experiment = make_experiment(config, tmp_path / 'x')
  made = program_module.make_program(experiment, experiment.mesh, keep=True)
  state = made.first_state(experiment.start(made.shardings.params, None).params)
  spec = experiment.batch_spec(config.train.batch_size)
  batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec)
  rows = program_module.sharding.batch_sharding(experiment.mesh)
  batch = jax.device_put(batch, rows)
  with jax.set_mesh(experiment.mesh):
    made.run(state, batch, experiment.load_frozen())
  assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_batches_of_several_shapes_have_a_program_each(
  config, tmp_path, programs_folder, known, traced
):
  config = copy.deepcopy(config)
  config.data.kind = 'tests.training.buckets_training_test:Shaped'
  _, whole = start(config, tmp_path / 'whole', steps=4)
  assert len(list(programs_folder.iterdir())) == 2
  start(config, tmp_path / 'w')
  count = len(traced)
  _, rows = start(config, tmp_path / 'w')
  assert len(traced) == count
  assert [row['loss'] for row in rows] == [row['loss'] for row in whole]


def test_another_config_has_a_program_of_its_own(
  config, tmp_path, programs_folder, known, traced
):
  start(config, tmp_path / 'a')
  count, other = len(traced), copy.deepcopy(config)
  other.train.optimizer.learning_rate *= 2
  start(other, tmp_path / 'b')
  assert len(traced) > count and len(list(programs_folder.iterdir())) == 2


@pytest.mark.parametrize('case', ['short', 'foreign'])
def test_short_runs_and_foreign_networks_keep_nothing(
  config, tmp_path, programs_folder, monkeypatch, case
):
  config = copy.deepcopy(config)
  if case == 'short':
    config.train.num_steps -= 1
    monkeypatch.setattr(StageExperiment, 'identity', 'known')
  start(config, tmp_path / 'w')
  assert not list(programs_folder.iterdir())


def test_an_identity_has_the_config_and_the_networks(config):
  config = copy.deepcopy(config)
  identity = lambda: make_experiment(config).identity
  assert identity() is None  # the tests' network is not the package's
  config.stage.net = {'kind': 'unet', 'channels': 8, 'norm_groups': 4}
  first = identity()
  assert UNet.__qualname__ in first and 'T5Encoder' in first
  config.seed += 1
  assert identity() != first
