"""Options of XLA's compiler."""

import pytest

from imagen_jax import compiler


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
