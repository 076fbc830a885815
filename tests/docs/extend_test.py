"""The examples of docs/extend.md do what the page says."""

import importlib
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.cli import prepare, train
from imagen_jax.cli.configs import load_config
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'extend.md'
BLOCK = re.compile(r'^```python title="(\w+\.py)"\n(.*?)^```', re.M | re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with the page's modules, on Python's path."""
  for name, code in BLOCK.findall(PAGE.read_text(encoding='utf-8')):
    (tmp_path / name).write_text(code, encoding='utf-8')
  monkeypatch.syspath_prepend(tmp_path)
  importlib.invalidate_caches()
  return tmp_path


@pytest.fixture
def npz(tmp_path):
  images = np.arange(2, dtype=np.uint8)[:, None, None, None] * 100
  np.savez(
    tmp_path / 'images.npz',
    images=np.broadcast_to(images, (2, 12, 16, 3)),
    captions=['black', 'grey'],
  )
  return tmp_path / 'images.npz'


def test_a_source_of_the_users_own_is_read_and_prepared(folder, npz):
  options = dict(kind='my_data:NpzSource', path=str(npz), size=8)
  source = make_source(**options)
  assert [(e['caption'], e['image'].max()) for e in source] == [
    ('black', 0),
    ('grey', 100),
  ]
  assert source[0]['image'].shape == (8, 8, 3)
  with pytest.raises(DataError):
    make_source(**options | {'path': str(folder / 'missing.npz')})

  out = folder / 'prepared'
  argv = ['--source', options['kind'], '--path', str(npz), '--size', '8']
  assert prepare.main([*argv, '--out', str(out)]) == 0
  prepared = make_source(kind='arrayrecord', path=str(out), size=8)
  assert [e['caption'] for e in prepared] == ['black', 'grey']


def test_a_network_of_the_users_own_predicts_0_at_the_start(folder):
  net = importlib.import_module('my_net').FlatNet(channels=32, num_blocks=1)
  z = jnp.ones((2, 4, 6, 3))
  level, text = jnp.zeros(2), jnp.ones((2, 5, 16))
  mask = jnp.ones((2, 5), bool)
  for extra in ((), (z, level)):
    run = jax.jit(net.init_with_output)
    out, _ = run(jax.random.key(0), z, level, text, mask, *extra)
    np.testing.assert_array_equal(out, np.zeros(z.shape))


def test_a_stage_is_planned_with_a_network_of_the_users_own(
  folder, capsys, monkeypatch
):
  monkeypatch.chdir(folder)
  argv = ['--config', 'my_config.py', '--workdir', 'run', '--dry_run']
  argv += ['--config.stage.net.num_blocks=1', '--config.train.batch_size=8']
  assert train.main(argv) == 0
  assert 'parameters' in capsys.readouterr().out
  assert not (folder / 'run').exists()


def test_an_experiment_of_the_users_own_is_trained_and_resumed(
  folder, monkeypatch
):
  monkeypatch.chdir(folder)
  argv = ['--config', 'my_run.py', '--workdir', 'run']
  argv += [f'--config.train.{key}=2' for key in ('log_every', 'eval_every')]
  argv += ['--config.train.batch_size=8']
  for steps in (2, 4):
    assert (
      train.main(
        [
          *argv,
          f'--config.train.num_steps={steps}',
          '--config.train.optimizer.decay=False',
        ]
      )
      == 0
    )
  rows = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(row)['step'] for row in rows] == [2, 4]
  assert all(json.loads(row)['heldout_loss_ema'] > 0 for row in rows)


def test_a_config_of_the_users_own_names_the_network(folder):
  config = load_config(str(folder / 'my_config.py'))
  assert config.stage.net.to_dict() == {
    'kind': 'my_net:FlatNet',
    'channels': 128,
  }
