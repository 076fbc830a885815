"""A command in an environment that was set up for something else."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from imagen_jax.cli import runtime


@pytest.mark.parametrize(
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
    jax.config.update(name, runtime.NUMERICS[name])


def test_a_platform_that_is_not_there_is_a_usage_error():
  code = 'import sys; from imagen_jax.cli.export import main; sys.exit(main())'
  command = [sys.executable, '-c', code, '--workdir', 'w', '--out', 'o']
  env = os.environ | {'JAX_PLATFORMS': 'abacus'}
  out = subprocess.run(command, env=env, capture_output=True, text=True)
  assert out.returncode == 2 and out.stderr.count('\n') == 1, out.stderr
