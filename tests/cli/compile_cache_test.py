"""Compiled programs in a bucket, between runs of two processes."""

import os
import subprocess
import sys

import pytest

from benchmarks import torture_runs
from tests import fake_bucket

# A program over the devices of all processes; prints whether it was found.
CODE = """
import argparse, sys
import jax, numpy as np
from jax._src import monitoring
from imagen_jax import sharding
from imagen_jax.cli import runtime

parser = argparse.ArgumentParser()
runtime.add_process_flags(parser)
runtime.start(processes=parser.parse_args())
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
mesh = sharding.make_mesh()
x = sharding.put_whole_batch(np.ones((8, 8), np.float32), mesh)
events = []
monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: (x**2).sum())(x).block_until_ready()
print('hits', sum(name.endswith('/cache_hits') for name in events))
"""


def run(url):
  """What each of two processes prints."""
  port = torture_runs.free_port()
  flags = [f'--coordinator=127.0.0.1:{port}', '--num_processes=2']
  environment = {'JAX_COMPILATION_CACHE_DIR': url, 'JAX_PLATFORMS': 'cpu'}
  jobs = [
    subprocess.Popen(
      [sys.executable, '-c', CODE, *flags, f'--process_id={i}'],
      env=os.environ | environment,
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  return [job.communicate(timeout=120)[0].split()[-1] for job in jobs]


@pytest.mark.slow
def test_process_0_writes_programs_to_a_bucket_and_later_runs_find_them():
  with fake_bucket.served('cache') as bucket:
    url = f'{bucket.url}/compile'
    assert run(url) == ['0', '0']
    (program,) = (bucket.folder / 'compile').glob('*-cache')
    # On CPU jax's key contains the process, so that process 1 finds none.
    assert run(url)[0] == '1'
    assert list((bucket.folder / 'compile').iterdir()) == [program]
