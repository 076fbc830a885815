"""Runs of a tiny base model for `torture.py`, and what they leave behind."""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
  '--config=shapes_base',
  '--config.text.path=demo',
  '--config.dtype=float32',
  '--config.train.batch_size=8',
  '--config.train.log_every=1',
  '--config.train.eval_every=None',
  '--config.train.sample_every=None',
  '--config.train.optimizer.kind=adam',
  '--config.train.optimizer.learning_rate=1e-3',
  '--config.stage.net.channels=16',
  '--config.stage.net.emb_channels=32',
  '--config.stage.net.head_dim=16',
  '--config.stage.net.num_res_blocks=(1,1)',
  '--config.stage.sampling.steps=1',
]


def command(workdir, steps, *more, script=ROOT / 'train.py'):
  return [
    sys.executable,
    str(script),
    *TINY,
    f'--workdir={workdir}',
    f'--config.train.num_steps={steps}',
    *more,
  ]


def environment(devices):
  flags = '--xla_cpu_collective_call_terminate_timeout_seconds=600'
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'XLA_FLAGS': flags,
    'PYTHONPATH': str(ROOT),
  }


def popen(workdir, steps, *more, devices=1, stderr=subprocess.DEVNULL):
  """Starts train.py."""
  return subprocess.Popen(
    command(workdir, steps, *more),
    env=environment(devices),
    stdout=subprocess.DEVNULL,
    stderr=stderr,
    text=True,
    cwd=ROOT,
  )


def attempt(workdir, steps, *more, devices=1):
  """Runs train.py to its end; returns (exit code, stderr)."""
  process = popen(
    workdir, steps, *more, devices=devices, stderr=subprocess.PIPE
  )
  _, stderr = process.communicate()
  return process.returncode, stderr


def run(workdir, steps, *more, devices=1):
  """Runs train.py, which must succeed."""
  code, stderr = attempt(workdir, steps, *more, devices=devices)
  if code:
    raise SystemExit(f'the run failed:\n{stderr[-2000:]}')


def last_step(workdir):
  try:
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return json.loads(lines[-1])['step'] if lines else 0
  except (OSError, ValueError):
    return 0


def states(workdir):
  """(step, state of the newest checkpoint, state before the first step)."""
  import jax
  import ml_collections

  from imagen_jax.cascade import stage, stage_config
  from imagen_jax.io import model_folder
  from imagen_jax.io.checkpoint import Checkpoints
  from imagen_jax.training.optimizer import make_optimizer
  from imagen_jax.training.state import init_state

  record = model_folder.load_stage(workdir)
  config = ml_collections.ConfigDict(record.config)
  made = stage_config.from_config(
    record.config['stage'],
    text_dim=record.text['dim'],
    text_len=record.text['max_len'],
  )
  tx = make_optimizer(config.train)
  first = jax.jit(lambda key: init_state(stage.init_params(made, key), tx))(
    jax.random.key(config.seed)
  )
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    state, _, step = checkpoints.restore(first)
  return step, named(state), named(first)


def named(tree):
  """{leaf: array}."""
  import jax

  return {
    jax.tree_util.keystr(path): jax.device_get(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return {row['step']: row['loss'] for row in map(json.loads, lines)}


def differing_bits(a, b):
  import numpy as np

  assert a.keys() == b.keys()
  total = 0
  for name in a:
    x, y = (np.frombuffer(v[name].tobytes(), np.uint8) for v in (a, b))
    total += int(np.unpackbits(x ^ y).sum())
  return total


def newest(workdir):
  from imagen_jax.io.checkpoint import Checkpoints

  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.latest_step() or 0


def parameters(state):
  import numpy as np

  return np.concatenate(
    [v.ravel() for k, v in sorted(state.items()) if k.startswith('.params')]
  ).astype(np.float64)


def norm(x):
  return float((x**2).sum() ** 0.5)


def together(workdir, steps, *more, devices, processes):
  """Runs several processes on this machine; returns process 0's output."""
  jobs = start(workdir, steps, *more, devices=devices, processes=processes)
  printed = [job.communicate()[0] for job in jobs]
  if any(job.returncode for job in jobs):
    raise SystemExit('\n'.join(text[-2000:] for text in printed))
  return printed[0]


def start(workdir, steps, *more, devices, processes, fault=None):
  """Starts the processes of a run, one with a fault of `torture_faults.py`."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  flags = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}']
  if processes == 1:
    flags = []
  script, more_environment = ROOT / 'train.py', {}
  if fault:
    script = ROOT / 'benchmarks' / 'torture_faults.py'
    more_environment = {'FAULT': fault}
  return [
    subprocess.Popen(
      command(workdir, steps, *more, *flags, script=script)
      + ([f'--process_id={i}'] if flags else []),
      env=environment(devices) | more_environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      cwd=ROOT,
    )
    for i in range(processes)
  ]
