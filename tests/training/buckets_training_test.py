"""Training on images of several shapes and with several captions."""

import jax
import numpy as np
import pytest

from imagen_jax.data.source import Source
from imagen_jax.errors import UsageError
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.training import loop
from imagen_jax.training.experiment import make_experiment
from imagen_jax.training.input import train_batches
from tests import tiny_model

SHAPES = {(8, 8): range(6), (6, 10): range(6, 12)}


class Shaped(Source):
  """Twelve images of two shapes, with two captions each."""

  buckets = SHAPES

  def __init__(self, size):
    del size

  def __len__(self):
    return 12

  def __getitem__(self, i):
    (shape,) = [s for s, chosen in SHAPES.items() if i in chosen]
    image = np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8)
    said = f'a red circle {i}', f'a blue square {i}'
    return {'image': image, 'caption': said[0], 'captions': said}


@pytest.fixture
def config(model):
  config = tiny_model.config(sample_every=6)
  config.text.path = str(model / 'text')
  config.data.kind = f'{__name__}:Shaped'
  return config


def final_params(workdir):
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.restore_subtree('params')[0], checkpoints.latest_step()


def test_a_run_on_several_shapes_resumes_to_the_bit(config, tmp_path):
  assert loop.train(config, tmp_path / 'whole') == 6
  calls = iter([False] * 3 + [True])
  loop.train(config, tmp_path / 'w', should_stop=lambda _: next(calls))
  assert final_params(tmp_path / 'w')[1] == 4
  assert loop.train(config, tmp_path / 'w') == 6
  found, whole = final_params(tmp_path / 'w'), final_params(tmp_path / 'whole')
  jax.tree.map(np.testing.assert_array_equal, found, whole)
  data = train_batches(make_experiment(config), 0)
  shapes = [next(data)['image'].shape[1:3] for _ in range(6)]
  assert sorted(shapes[:4]) == sorted(shapes[2:]) and len(set(shapes)) == 2
  assert (tmp_path / 'w' / 'samples' / 'step_0000006.png').exists()


def test_shapes_that_the_network_cannot_take_are_refused(model):
  config = tiny_model.config('sr1')
  config.text.path = str(model / 'text')
  config.data.kind = f'{__name__}:Shaped'
  with pytest.raises(UsageError) as error:
    make_experiment(config)
  assert error.value.key == 'config.data.aspect'
  config.stage.crop = 8
  with pytest.raises(UsageError) as error:
    make_experiment(config)
  assert error.value.key == 'config.stage.crop'
