"""What every command sets up before jax starts."""

import logging
import os
import pathlib


def start(*, split_cpu=False):
  """Compile cache, quiet logs, virtual CPU devices.

  Args:
    split_cpu: one virtual device per core, which training wants; sampling a
      few pictures is faster with all cores on one device.
  """
  import jax

  from imagen_jax import sharding

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    cache = pathlib.Path(base) / 'imagen_jax' / 'compile'
    jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  # A machine without a TPU or GPU is a normal place to run.
  logging.getLogger('jax._src.xla_bridge').setLevel(logging.ERROR)
  if split_cpu:
    sharding.set_cpu_devices()
