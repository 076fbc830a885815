"""One process of a job that only saves, which `torture.py` kills and delays.

  python benchmarks/torture_saves.py DIRECTORY STEPS PORT PROCESS PROCESSES
      [--die PHASE:STEP] [--delay SECONDS]

The state is sharded over all devices of the job; step by step it changes by a
rule. At the end, line by line: the state's digest, the step resumed from, and
the bytes digested and read by this process at the restore.
"""

import argparse
import hashlib
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from imagen_jax import sharding
from imagen_jax.io import files, manifest
from imagen_jax.io.checkpoint import Checkpoints

# Where a process can die, in the order of a save.
PHASES = ('room', 'writing', 'written', 'digested', 'whole', 'removing')


def before(owner, name, act):
  """Calls `act` before the attribute `name` of `owner`."""
  whole = getattr(owner, name)

  def wrapped(*args, **options):
    act()
    return whole(*args, **options)

  setattr(owner, name, wrapped)


def after(owner, name, act):
  whole = getattr(owner, name)

  def wrapped(*args, **options):
    result = whole(*args, **options)
    act()
    return result

  setattr(owner, name, wrapped)


def arm(checkpoints, phase):
  """Makes the process kill itself in a phase of the next save."""
  die = lambda: os.kill(os.getpid(), signal.SIGKILL)
  if phase == 'room':
    before(checkpoints, '_make_room', die)
  elif phase == 'writing':
    after(checkpoints._orbax, 'save', die)
  elif phase == 'written':
    before(manifest, 'digests', die)
  elif phase == 'digested':
    after(manifest, 'digests', die)
  elif phase == 'whole':
    before(checkpoints, '_retire', die)
    if jax.process_index():
      after(manifest, 'digests', lambda: (time.sleep(1), die()))
  elif phase == 'removing':

    def remove(step):
      (checkpoints._path(step) / manifest.NAME).unlink()
      die()

    checkpoints._remove = remove


@jax.jit
def advance(state):
  return jax.tree.map(lambda x: jnp.sin(3 * x), state)


def bytes_read():
  """By tensorstore, from files or a bucket."""
  metrics = tensorstore.experimental_collect_matching_metrics(
    '/tensorstore/kvstore/'
  )
  return sum(
    value['value']
    for metric in metrics
    if metric['name'].split('/')[-2] in ('file', 'gcs')
    and metric['name'].endswith('/bytes_read')
    for value in metric['values']
  )


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('directory')
  for name in 'steps', 'port', 'process', 'processes':
    parser.add_argument(name, type=int)
  parser.add_argument('--die')
  parser.add_argument('--delay', type=float)
  parser.add_argument('--fsdp', type=int, default=1)
  args = parser.parse_args()
  if args.processes > 1:
    jax.distributed.initialize(
      f'127.0.0.1:{args.port}',
      args.processes,
      args.process,
      heartbeat_timeout_seconds=100,
    )
  mesh = sharding.make_mesh(fsdp=args.fsdp)
  shapes = {
    'large': jax.ShapeDtypeStruct((64, 1 << 15), jnp.float32),
    'small': jax.ShapeDtypeStruct((3, 5), jnp.float32),
  }
  shardings = sharding.state_shardings(shapes, mesh)
  key = jax.random.key(0)  # noise, so that compression does not count
  noise = lambda: jax.tree.map(
    lambda x: jax.random.normal(key, x.shape), shapes
  )
  state, start = jax.jit(noise, out_shardings=shardings)(), 0
  digested = []
  with Checkpoints(args.directory, keep_last=2) as checkpoints:
    count = checkpoints._agree('count', lambda _: len(checkpoints.all_steps()))
    if count:
      digest = files.digest
      files.digest = lambda path: digested.append(digest(path)) or digested[-1]
      state, _, start = checkpoints.restore(
        sharding.with_shardings(shapes, shardings)
      )
      files.digest = digest
    read = bytes_read()
    if args.delay:
      before(manifest, 'digests', lambda: time.sleep(args.delay))
    phase, _, when = (args.die or 'none:0').partition(':')
    for step in range(start + 1, args.steps + 1):
      state = advance(state)
      if step == int(when):
        checkpoints.wait()
        arm(checkpoints, phase)
      checkpoints.save(step, state, {})
  whole = {name: sharding.fetch(array) for name, array in state.items()}
  sha = hashlib.sha256(b''.join(np.asarray(whole[n]).tobytes() for n in whole))
  total = sum(each['bytes'] for each in digested)
  print(f'state {sha.hexdigest()} {start} {total} {read}', flush=True)


if __name__ == '__main__':
  main()
