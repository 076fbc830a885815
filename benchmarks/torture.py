r"""Stress test of training: interruptions, damage, a full disk, other meshes.

  python benchmarks/torture.py                 all parts, about half an hour
  python benchmarks/torture.py cuts --num 4    one part

  cuts     the run is ended by SIGTERM and kill -9 at random moments, resumed
           each time, and compared with an uninterrupted run
  damage   files of a checkpoint get a flipped bit, are truncated or deleted
  disk     the disk fills up, or becomes read-only (needs root, for a mount)
  memory   resident memory over a long run
  meshes   the same run on one device, replicated, sharded, over processes
  hosts    one of two processes gets SIGTERM, or is killed

Each part prints one table; the exit code is 1 if anything was lost.
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

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


def command(workdir, steps, *more):
  return [
    sys.executable,
    str(ROOT / 'train.py'),
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


def run(workdir, steps, *more, devices=1):
  """Runs train.py to the end; returns its stderr."""
  done = subprocess.run(
    command(workdir, steps, *more),
    env=environment(devices),
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  if done.returncode:
    raise SystemExit(f'the run failed:\n{done.stderr[-2000:]}')
  return done.stderr


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

  from imagen_jax.cascade import stage
  from imagen_jax.io import model_folder
  from imagen_jax.io.checkpoint import Checkpoints
  from imagen_jax.training.optimizer import make_optimizer
  from imagen_jax.training.state import init_state

  record = model_folder.load_stage(workdir)
  config = ml_collections.ConfigDict(record.config)
  made = stage.from_config(
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


# ---- Cuts ------------------------------------------------------------------
def cuts(folder, args):
  """SIGTERM and kill -9 alternate at random moments; final states compared."""
  print('devices  cuts  SIGTERM  kill -9  most steps redone  bits that differ')
  lost = 0
  for devices in args.devices:
    per_cut = 15
    steps = per_cut * (args.num + 1)
    more = ['--config.train.checkpoint_every=7']
    whole, cut = folder / f'whole_{devices}', folder / f'cut_{devices}'
    run(whole, steps, *more, devices=devices)
    rng = random.Random(devices)
    redone, kinds = 0, {signal.SIGTERM: 0, signal.SIGKILL: 0}
    for i in range(args.num):
      kind = [signal.SIGTERM, signal.SIGKILL][i % 2]
      process = subprocess.Popen(
        command(cut, steps, *more),
        env=environment(devices),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
      )
      os.set_blocking(process.stderr.fileno(), False)
      before = last_step(cut)
      goal = per_cut * i + rng.randrange(1, per_cut)
      while last_step(cut) <= max(goal, before) and process.poll() is None:
        time.sleep(0.02)
      time.sleep(rng.random() * 0.3)
      process.send_signal(kind)
      code = process.wait()
      kinds[kind] += 1
      if kind == signal.SIGTERM and code != 143:
        print(f'SIGTERM ended in {code}: {process.stderr.read()}')
        lost += 1
      if kind == signal.SIGKILL:
        redone = max(redone, last_step(cut) - newest(cut))
    run(cut, steps, *more, devices=devices)
    (step, mine, _), (_, theirs, _) = states(cut), states(whole)
    bits = differing_bits(mine, theirs)
    assert step == steps
    if losses(cut) != losses(whole):
      print('the two metrics.jsonl tell different losses')
      lost += 1
    lost += bits > 0
    print(
      f'{devices:7} {args.num:5} {kinds[signal.SIGTERM]:8} '
      f'{kinds[signal.SIGKILL]:8} {redone:18} {bits:17}'
    )
  return lost


def newest(workdir):
  from imagen_jax.io.checkpoint import Checkpoints

  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.latest_step() or 0


# ---- Damage ----------------------------------------------------------------
def damage(folder, args):
  """All damage must be detected and the step before it restored."""
  import logging

  import jax.numpy as jnp

  from imagen_jax.errors import ModelError
  from imagen_jax.io.checkpoint import Checkpoints

  logging.disable(logging.WARNING)
  state = {f'w{i}': jnp.arange(4096.0) + i for i in range(4)}
  with Checkpoints(folder / 'steps') as checkpoints:
    checkpoints.save(1, state)
    checkpoints.save(2, state, wait=True)
  rng = random.Random(0)
  files = sorted(p for p in (folder / 'steps/2').rglob('*') if p.is_file())
  print('kind      tried  noticed  step before restored')
  lost = 0
  for kind, fraction in (('flip', 0.8), ('truncate', 0.1), ('delete', 0.1)):
    tried = noticed = restored = 0
    for _ in range(max(1, int(args.damages * fraction))):
      path = rng.choice(files)
      whole = path.read_bytes()
      if kind == 'flip' and whole:
        raw, bit = bytearray(whole), rng.randrange(8 * len(whole))
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
      elif kind == 'truncate' and whole:
        path.write_bytes(whole[: rng.randrange(len(whole))])
      else:
        path.unlink()
      tried += 1
      with Checkpoints(folder / 'steps') as checkpoints:
        try:
          checkpoints.verify(2)
        except ModelError:
          noticed += 1
        restored += checkpoints.newest_good()[0] == 1
      path.write_bytes(whole)
    print(f'{kind:9} {tried:5} {noticed:8} {restored:21}')
    lost += (tried - noticed) + (tried - restored)
  logging.disable(logging.NOTSET)
  return lost


# ---- Disk ------------------------------------------------------------------
def disk(folder, args):
  """The last good step remains, and the run ends with one clear error."""
  del args
  mount = folder / 'small'
  mount.mkdir()
  lost = 0
  for kind in ('full', 'read-only'):
    made = subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=24m', 'none', str(mount)],
      capture_output=True,
    )
    if made.returncode:
      print('disk: not run, mounting a small file system needs root')
      return 0
    try:
      workdir = mount / 'run'
      run(workdir, 5, '--config.train.checkpoint_every=5')
      if kind == 'full':
        (mount / 'ballast').write_bytes(bytes(free_bytes(mount) - 100_000))
      else:
        subprocess.run(['mount', '-o', 'remount,ro', str(mount)], check=True)
      more = ['--config.train.checkpoint_every=5']
      done = subprocess.run(
        command(workdir, 30, *more),
        env=environment(1),
        capture_output=True,
        text=True,
        cwd=ROOT,
      )
      said = done.stderr.strip().splitlines()[-1][:300]
      subprocess.run(['mount', '-o', 'remount,rw', str(mount)], check=True)
      good = newest(workdir) == 5 and states(workdir)[0] == 5
      plain = said.startswith('error: ') and 'Traceback' not in done.stderr
      lost += not (good and plain and done.returncode)
      print(f'{kind}: exit {done.returncode}, step 5 intact: {good}')
      print('  ' + (said if plain else done.stderr[-3000:]))
    finally:
      subprocess.run(['umount', '-l', str(mount)])
  return lost


def free_bytes(path):
  stat = os.statvfs(path)
  return stat.f_bavail * stat.f_frsize


# ---- Memory ----------------------------------------------------------------
def memory(folder, args):
  """Resident memory after a tenth of the run and at its end."""
  workdir = folder / 'long'
  process = subprocess.Popen(
    command(workdir, args.steps, '--config.train.checkpoint_every=500'),
    env=environment(1),
    stderr=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    cwd=ROOT,
  )
  sizes = {}
  while process.poll() is None:
    try:
      text = pathlib.Path(f'/proc/{process.pid}/status').read_text()
      sizes[last_step(workdir)] = int(re.search(r'VmRSS:\s+(\d+)', text)[1])
    except (OSError, TypeError):  # the process has just ended
      break
    time.sleep(0.5)
  process.wait()
  late = [size for step, size in sizes.items() if step > args.steps / 10]
  first, final = late[0] / 1024, late[-1] / 1024
  print(
    f'memory: {first:.0f} MiB after {args.steps // 10} steps, {final:.0f} MiB '
    f'after {args.steps}'
  )
  return int(process.returncode != 0 or final > 1.05 * first)


# ---- Meshes ----------------------------------------------------------------
# (name, devices per process, processes, data, fsdp)
MESHES = (
  ('one device', 1, 1, 1, 1),
  ('data 8', 8, 1, 8, 1),
  ('fsdp 8', 8, 1, 1, 8),
  ('data 2 × fsdp 4', 8, 1, 2, 4),
  ('2 processes, data 8', 4, 2, 8, 1),
  ('2 processes, 2 × 4', 4, 2, 2, 4),
  ('4 processes, fsdp 8', 2, 4, 1, 8),
)


def meshes(folder, args):
  """Ten steps of Adam in float32 on every mesh, against one device."""

  print('mesh                   loss  way of the parameters  MiB a device')
  lost, reference = 0, None
  wide = [
    '--config.stage.net.channels=64',
    '--config.stage.net.head_dim=32',
    # With a longer warm-up ten updates are as small as rounding errors.
    '--config.train.optimizer.warmup=20',
  ]
  for name, devices, processes, data, fsdp in MESHES:
    if args.only and name not in ('one device', *args.only):
      continue
    workdir = folder / re.sub(r'\W+', '_', name)
    more = [*wide, f'--config.mesh.data={data}', f'--config.mesh.fsdp={fsdp}']
    printed = together(workdir, 10, *more, devices=devices, processes=processes)
    held = float(re.search(r'a device holds ([\d.,]+) MiB', printed)[1])
    if 'nvoluntary full rematerialization' in printed:
      print(f'{name}: XLA rematerialized a whole array')
      lost += 1
    _, state, start = states(workdir)
    found = losses(workdir), parameters(state)
    reference = reference or (*found, parameters(start))
    loss = max(
      abs(found[0][i] - reference[0][i]) / reference[0][i] for i in found[0]
    )
    # Distance between two runs' parameters, relative to that travelled by one.
    way = norm(reference[1] - reference[2])
    off = norm(found[1] - reference[1]) / way
    lost += loss > 1e-5 or off > 1e-5
    print(f'{name:20} {loss:8.1e} {off:22.1e} {held:13.2f}', flush=True)
  return lost


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


def start(workdir, steps, *more, devices, processes):
  """Starts the processes of a run."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  flags = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}']
  if processes == 1:
    flags = []
  return [
    subprocess.Popen(
      command(workdir, steps, *more, *flags)
      + ([f'--process_id={i}'] if flags else []),
      env=environment(devices),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      cwd=ROOT,
    )
    for i in range(processes)
  ]


# ---- Hosts -----------------------------------------------------------------
def hosts(folder, args):
  """SIGTERM to one process makes both save and stop; kill -9 ends both."""
  lost = 0
  workdir = folder / 'hosts'
  for kind, steps in ((signal.SIGTERM, 100_000), (signal.SIGKILL, 100_000)):
    before = newest(workdir) if (workdir / 'checkpoints').exists() else 0
    jobs = start(workdir, steps, devices=1, processes=2)
    while last_step(workdir) <= before + 5:
      if any(job.poll() is not None for job in jobs):
        raise SystemExit(jobs[0].communicate()[0][-2000:])
      time.sleep(0.1)
    jobs[1].send_signal(kind)
    began = time.perf_counter()
    try:
      codes = [job.wait(timeout=args.patience) for job in jobs]
    except subprocess.TimeoutExpired:
      codes = [job.kill() or 'hangs' for job in jobs]
    saved = newest(workdir)
    print(
      f'{kind.name} to process 1: exit codes {codes} after '
      f'{time.perf_counter() - began:.0f} s, newest checkpoint {saved}'
    )
    if kind == signal.SIGTERM:
      lost += codes != [143, 143] or saved <= before
    else:
      lost += codes[0] in (0, 'hangs') or saved < before
  return lost


PARTS = {f.__name__: f for f in (cuts, damage, disk, memory, meshes, hosts)}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('parts', nargs='*', help=f'of {", ".join(PARTS)}')
  parser.add_argument('--num', type=int, default=20, help='cuts')
  parser.add_argument('--devices', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--damages', type=int, default=1000)
  parser.add_argument('--steps', type=int, default=5000, help='of memory')
  parser.add_argument('--only', action='append', help='a row of meshes')
  parser.add_argument('--patience', type=float, default=300, help='of hosts')
  args = parser.parse_args()
  lost = 0
  for name in args.parts or PARTS:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f'torture-{name}-'))
    start = time.perf_counter()
    try:
      lost += PARTS[name](folder, args)
    finally:
      shutil.rmtree(folder, ignore_errors=True)
    print(f'({name}: {time.perf_counter() - start:.0f} s)\n', flush=True)
  return int(lost > 0)


if __name__ == '__main__':
  sys.exit(main())
