"""A command in an environment that was set up for something else."""

import argparse
import faulthandler
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import imagen_jax
from imagen_jax import dtypes
from imagen_jax.cli import runtime, train
from imagen_jax.errors import ImagenError, UsageError
from imagen_jax.training import loop

OTHERS = pytest.mark.parametrize(
  ('name', 'other'),
  [
    ('jax_enable_x64', True),
    ('jax_default_prng_impl', 'rbg'),
    ('jax_threefry_partitionable', False),
    ('jax_random_seed_offset', 3),
    ('jax_numpy_dtype_promotion', 'strict'),
    ('jax_numpy_rank_promotion', 'raise'),
  ],
)


@OTHERS
def test_a_command_s_numbers_do_not_depend_on_the_environment(
  name, other, capfd
):
  def state():
    key = jax.random.key(7)
    noise = jax.random.normal(key, (3,)) * np.ones((2, 3), int)
    return jax.random.key_impl(key), noise.dtype, np.asarray(noise).tolist()

  expected = state()
  jax.config.update(name, other)
  try:
    runtime.start()
    assert state() == expected
    assert name.upper() in capfd.readouterr().err
    runtime.start()
    assert capfd.readouterr().err == ''
  finally:
    jax.config.update(name, dtypes.NUMERICS[name])


@OTHERS
def test_the_library_s_numbers_do_not_depend_on_it_either(model, name, other):
  cascade = imagen_jax.load(model)
  expected = cascade.sample('a red circle')['sr1']
  jax.config.update(name, other)
  try:
    if name == 'jax_random_seed_offset':  # no context manager sets it
      with pytest.raises(UsageError):
        cascade.sample('a red circle')
      return
    found = cascade.sample('a red circle')['sr1']
    np.testing.assert_array_equal(found, expected)
    assert getattr(jax.config, name) == other or name.endswith('promotion')
  finally:
    jax.config.update(name, dtypes.NUMERICS[name])


def test_training_as_a_library_has_the_types_of_the_command(monkeypatch):
  def experiment(*_):
    raise TypeError(jnp.asarray(np.float64(1)).dtype)

  monkeypatch.setattr(loop, 'make_experiment', experiment)
  jax.config.update('jax_enable_x64', True)
  try:
    with pytest.raises(TypeError, match='float32'):
      off = {'startup_seconds': 0.0, 'hang_seconds': 0.0}
      loop.train(ConfigDict({'train': {'log_to': ''} | off}), 'w')
  finally:
    jax.config.update('jax_enable_x64', False)


CODE = 'import sys; from imagen_jax.cli.sample import main; sys.exit(main())'


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&- >&- 2>&-'])
def test_a_command_works_with_closed_streams(model, tmp_path, closed):
  words = ['--model', str(model), '--stages', 'base', '--prompt', 'a', '--out']
  command = ['sh', '-c', f'exec "$@" {closed}', 'sh', sys.executable, '-c']
  out = subprocess.run(
    [*command, CODE, *words, str(tmp_path / 'out')],
    env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
  )
  assert out.returncode == 0
  assert len(list((tmp_path / 'out').glob('0*.png'))) == 1


def test_a_folder_that_was_removed_is_one_sentence(tmp_path):
  (tmp_path / 'here').mkdir()
  code = f'import os; os.rmdir(os.getcwd()); {CODE}'
  out = subprocess.run(
    [sys.executable, '-c', code, '--prompt', 'a', '--out', str(tmp_path / 'o')],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
    cwd=tmp_path / 'here',
    capture_output=True,
    text=True,
  )
  assert out.returncode == 2 and out.stderr.startswith('error: ')


def test_a_platform_that_is_not_there_is_a_usage_error():
  code = 'import sys; from imagen_jax.cli.export import main; sys.exit(main())'
  command = [sys.executable, '-c', code, '--workdir', 'w', '--out', 'o']
  env = os.environ | {'JAX_PLATFORMS': 'abacus'}
  out = subprocess.run(command, env=env, capture_output=True, text=True)
  assert out.returncode == 2 and out.stderr.count('\n') == 1, out.stderr


@pytest.mark.parametrize(
  'error,code', [(RuntimeError('timeout'), 1), (ValueError('no address'), 2)]
)
def test_a_late_process_is_no_usage_error(monkeypatch, error, code):
  def initialize(*_):
    raise error

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  parser = argparse.ArgumentParser()
  runtime.add_process_flags(parser)
  with pytest.raises(ImagenError) as raised:
    runtime.start(processes=parser.parse_args(['--distributed']))
  assert raised.value.exit_code == code


@pytest.mark.parametrize('together,code', [(True, 1), (False, 2)])
def test_a_job_without_devices_may_try_again(monkeypatch, together, code):
  def devices():
    raise RuntimeError('Unable to initialize backend')

  monkeypatch.setattr(jax, 'devices', devices)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: together)
  with pytest.raises(ImagenError) as raised:
    runtime.start()
  assert raised.value.exit_code == code


@pytest.mark.parametrize('folder,xla', [('gs://b/c', False), ('/tmp/c', True)])
def test_xla_s_own_caches_are_off_where_programs_are_in_a_bucket(
  monkeypatch, folder, xla
):
  name = 'jax_persistent_cache_enable_xla_caches'
  before = getattr(jax.config, name)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', folder)
  try:
    runtime.start()
    assert bool(getattr(jax.config, name)) == xla
  finally:
    jax.config.update(name, before)


def test_sigusr1_prints_all_stacks_and_the_training_continues(capfd):
  assert train.main(['--no_such_flag']) == 2
  try:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert 'runtime_test.py' in capfd.readouterr().err
  finally:
    faulthandler.unregister(signal.SIGUSR1)
