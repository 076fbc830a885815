"""Options of XLA's compiler."""

import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from imagen_jax import compiler
from imagen_jax.errors import UsageError
from imagen_jax.training import program


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  compiler.sampling_options.cache_clear()
  yield
  compiler.sampling_options.cache_clear()


def test_this_jax_knows_the_option():
  assert compiler.sampling_options() == compiler.EIGEN


def test_a_flag_of_the_users_is_left_alone(monkeypatch):
  flag = '--xla_cpu_experimental_ynn_fusion_type=individual_dot'
  monkeypatch.setenv('XLA_FLAGS', flag)
  assert compiler.sampling_options() is None


def test_an_option_that_this_jax_does_not_know(monkeypatch):
  monkeypatch.setattr(compiler, 'EIGEN', {'xla_cpu_no_such_option': True})
  assert compiler.sampling_options() is None


def test_this_jax_knows_the_options_for_gpus():
  """XLA has the same table of names for a CPU."""
  for name, value in compiler.PRESETS['gpu'].items():
    assert compiler._knows(jax.devices()[0], {name: value}), name


@pytest.fixture
def preset(monkeypatch):
  """The options of a CPU, which has none of its own."""
  made = {'xla_cpu_enable_fast_math': False, 'xla_no_such_option': True}
  monkeypatch.setitem(compiler.PRESETS, 'cpu', made)
  compiler._known.cache_clear()
  yield made
  compiler._known.cache_clear()


def test_unknown_options_of_training_are_left_out_in_one_line(preset, capsys):
  options = compiler.training_options(jax.devices()[0])
  assert options == {'xla_cpu_enable_fast_math': False}
  said = capsys.readouterr().out
  assert said.count('\n') == 1 and 'xla_no_such_option' in said
  assert 'fast_math' not in said


def test_options_of_training_that_the_user_set_are_left_alone(
  preset, monkeypatch, capsys
):
  flags = '--xla_cpu_enable_fast_math=true --xla_no_such_option=1'
  monkeypatch.setenv('XLA_FLAGS', flags)
  assert compiler.training_options(jax.devices()[0]) == {}
  assert capsys.readouterr().out == ''


def step_options(platform, choice):
  device = type('Device', (), {'platform': platform, 'process_index': 0})()
  mesh = types.SimpleNamespace(devices=np.array([[device]], dtype=object))
  config = ConfigDict({'mesh': {'cpu': 'one_eigen', 'xla': choice}})
  return program._compiler_options(config, mesh)


def test_a_step_has_the_options_of_its_devices(monkeypatch):
  monkeypatch.setattr(compiler, '_knows', lambda device, options: True)
  compiler._known.cache_clear()
  for platform in compiler.PRESETS:
    assert step_options(platform, 'preset') == compiler.PRESETS[platform]
    assert step_options(platform, 'none') is None
  assert step_options('cpu', 'preset') == compiler.EIGEN
  with pytest.raises(UsageError) as error:
    step_options('cpu', 'fast')
  assert error.value.key == 'config.mesh.xla'
