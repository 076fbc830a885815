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
  saves    one of two processes that save is killed in every phase of a save, or
           is slow; on disk and in a bucket, emulated on this machine
  faults   one of two processes fails, or hangs

Each part prints one table; the exit code is 1 if anything was lost.
"""

import argparse
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import torture_runs as runs


# ---- Cuts ------------------------------------------------------------------
def cuts(folder, args):
  """SIGTERM and kill -9 alternate at random moments; final states compared."""
  print('devices  cuts  SIGTERM  kill -9  most steps repeated  differing bits')
  failures = 0
  for devices in args.devices:
    per_cut = 15
    steps = per_cut * (args.num + 1)
    more = ['--config.train.checkpoint_every=7']
    whole, cut = folder / f'whole_{devices}', folder / f'cut_{devices}'
    runs.run(whole, steps, *more, devices=devices)
    rng = random.Random(devices)
    repeated, kinds = 0, {signal.SIGTERM: 0, signal.SIGKILL: 0}
    for i in range(args.num):
      kind = [signal.SIGTERM, signal.SIGKILL][i % 2]
      process = runs.popen(
        cut, steps, *more, devices=devices, stderr=subprocess.PIPE
      )
      os.set_blocking(process.stderr.fileno(), False)
      before = runs.last_step(cut)
      goal = per_cut * i + rng.randrange(1, per_cut)
      while runs.last_step(cut) <= max(goal, before) and process.poll() is None:
        time.sleep(0.02)
      time.sleep(rng.random() * 0.3)
      process.send_signal(kind)
      code = process.wait()
      kinds[kind] += 1
      if kind == signal.SIGTERM and code != 143:
        print(f'SIGTERM ended in {code}: {process.stderr.read()}')
        failures += 1
      if kind == signal.SIGKILL:
        repeated = max(repeated, runs.last_step(cut) - runs.newest(cut))
    runs.run(cut, steps, *more, devices=devices)
    (step, mine, _), (_, theirs, _) = runs.states(cut), runs.states(whole)
    bits = runs.differing_bits(mine, theirs)
    assert step == steps
    if runs.losses(cut) != runs.losses(whole):
      print('the losses in the two metrics.jsonl differ')
      failures += 1
    failures += bits > 0
    print(
      f'{devices:7} {args.num:5} {kinds[signal.SIGTERM]:8} '
      f'{kinds[signal.SIGKILL]:8} {repeated:20} {bits:15}'
    )
  return failures


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
  print('kind      tried  detected  previous step restored')
  failures = 0
  for kind, fraction in (('flip', 0.8), ('truncate', 0.1), ('delete', 0.1)):
    tried = detected = restored = 0
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
          detected += 1
        restored += checkpoints.newest_good()[0] == 1
      path.write_bytes(whole)
    print(f'{kind:9} {tried:5} {detected:9} {restored:23}')
    failures += (tried - detected) + (tried - restored)
  logging.disable(logging.NOTSET)
  return failures


# ---- Disk ------------------------------------------------------------------
def disk(folder, args):
  """The last good step remains, and the run ends with one clear error."""
  del args
  mount = folder / 'small'
  mount.mkdir()
  failures = 0
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
      every_five = '--config.train.checkpoint_every=5'
      runs.run(workdir, 5, every_five)
      if kind == 'full':
        (mount / 'ballast').write_bytes(bytes(free_bytes(mount) - 100_000))
      else:
        subprocess.run(['mount', '-o', 'remount,ro', str(mount)], check=True)
      code, stderr = runs.attempt(workdir, 30, every_five)
      said = stderr.strip().splitlines()[-1][:300]
      subprocess.run(['mount', '-o', 'remount,rw', str(mount)], check=True)
      good = runs.newest(workdir) == 5 and runs.states(workdir)[0] == 5
      plain = said.startswith('error: ') and 'Traceback' not in stderr
      failures += not (good and plain and code)
      print(f'{kind}: exit {code}, step 5 intact: {good}')
      print('  ' + (said if plain else stderr[-3000:]))
    finally:
      subprocess.run(['umount', '-l', str(mount)])
  return failures


def free_bytes(path):
  stat = os.statvfs(path)
  return stat.f_bavail * stat.f_frsize


# ---- Memory ----------------------------------------------------------------
def memory(folder, args):
  """Resident memory after a tenth of the run and at its end."""
  workdir = folder / 'long'
  process = runs.popen(
    workdir, args.steps, '--config.train.checkpoint_every=500'
  )
  sizes = {}
  while process.poll() is None:
    try:
      text = pathlib.Path(f'/proc/{process.pid}/status').read_text()
      sizes[runs.last_step(workdir)] = int(
        re.search(r'VmRSS:\s+(\d+)', text)[1]
      )
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
  print('mesh                   loss             parameters  MiB per device')
  failures, reference = 0, None
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
    printed = runs.together(
      workdir, 10, *more, devices=devices, processes=processes
    )
    held = float(re.search(r'a device holds ([\d.,]+) MiB', printed)[1])
    if 'nvoluntary full rematerialization' in printed:
      print(f'{name}: XLA rematerialized a whole array')
      failures += 1
    _, state, start = runs.states(workdir)
    found = runs.losses(workdir), runs.parameters(state)
    reference = reference or (*found, runs.parameters(start))
    loss = max(
      abs(found[0][i] - reference[0][i]) / reference[0][i] for i in found[0]
    )
    # Distance between the runs' parameters, relative to that of the training.
    moved = runs.norm(reference[1] - reference[2])
    off = runs.norm(found[1] - reference[1]) / moved
    failures += loss > 1e-5 or off > 1e-5
    print(f'{name:20} {loss:8.1e} {off:22.1e} {held:15.2f}', flush=True)
  return failures


# ---- Hosts -----------------------------------------------------------------
def hosts(folder, args):
  """SIGTERM to one process makes both save and stop; kill -9 ends both."""
  failures = 0
  workdir = folder / 'hosts'
  for kind, steps in ((signal.SIGTERM, 100_000), (signal.SIGKILL, 100_000)):
    before = runs.newest(workdir) if (workdir / 'checkpoints').exists() else 0
    jobs = runs.start(workdir, steps, devices=1, processes=2)
    while runs.last_step(workdir) <= before + 5:
      if any(job.poll() is not None for job in jobs):
        raise SystemExit(jobs[0].communicate()[0][-2000:])
      time.sleep(0.1)
    jobs[1].send_signal(kind)
    began = time.perf_counter()
    try:
      codes = [job.wait(timeout=args.patience) for job in jobs]
    except subprocess.TimeoutExpired:
      codes = [job.kill() or 'hangs' for job in jobs]
    saved = runs.newest(workdir)
    print(
      f'{kind.name} to process 1: exit codes {codes} after '
      f'{time.perf_counter() - began:.0f} s, newest checkpoint {saved}'
    )
    if kind == signal.SIGTERM:
      failures += codes != [143, 143] or saved <= before
    else:
      failures += codes[0] in (0, 'hangs') or saved < before
  return failures


# ---- Saves -----------------------------------------------------------------
PROCESSES, SAVES, DIES = 2, 5, 4


def saves(folder, args):
  """No phase of a save loses a whole step, and no slow process does."""
  sys.path.insert(0, str(runs.ROOT))
  from tests import fake_bucket

  failures = 0
  print('where   process  phase      whole after  least whole  differing runs')
  with fake_bucket.served() as bucket:
    for where, top in (('disk', folder), ('bucket', bucket.url)):
      if args.only and where not in args.only:
        continue
      _, whole, _ = job(f'{top}/whole', SAVES)
      cases = [(p, i) for p in PHASES for i in range(PROCESSES)]
      cases = [(p, i) for p, i in cases if i == 0 or p in PHASES[:4]]
      for phase, process in cases[: args.num]:
        steps = f'{top}/{phase}_{process}'
        _, _, least = job(
          steps, SAVES, '--die', f'{phase}:{DIES}', dies=process
        )
        kept = len(whole_steps(steps))
        codes, state, _ = job(steps, SAVES)
        lost = not kept or least < 1 or any(codes) or state != whole
        failures += lost
        print(
          f'{where:7} {process:7}  {phase:10} {kept:11} {least:12} '
          f'{int(state != whole):15}',
          flush=True,
        )
      codes, state, least = job(f'{top}/slow', 6, '--delay', '1', slow=1)
      failures += least < 2 or any(codes)
      print(
        f'{where:7} {1:7}  slow, 1 s × 6 {len(whole_steps(f"{top}/slow")):9}'
        f' {least:11} {int(any(codes)):15}',
        flush=True,
      )
      failures += elastic(f'{top}/elastic', where)
      failures += flipped(f'{top}/flipped', where)
  return failures


PHASES = ('room', 'writing', 'written', 'digested', 'whole', 'removing')


def elastic(steps, where):
  """What four processes saved is read by two: each byte once."""
  job(steps, 2, processes=4)
  _, whole, _ = job(f'{steps}_whole', 2)
  _, state, _ = job(steps, 2)
  size = sum(s for n, s in tree(f'{steps}/2').items() if n != 'manifest.json')
  digested, read = (sum(int(line[i]) for line in REPORTS) for i in (3, 4))
  print(
    f'{where}: 4 → 2 processes, {size / 1e6:.1f} MB: {digested / size:.2f}× '
    f'digested, {read / size:.2f}× read'
  )
  return int(state != whole or digested != size or read > 1.1 * size)


def flipped(steps, where):
  """A bit that one process finds flipped makes both skip the step."""
  from imagen_jax.io import bucket

  _, whole, _ = job(steps, 3)
  sizes = tree(f'{steps}/3')
  path = bucket.at(steps) / '3' / max(sizes, key=sizes.get)
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)
  codes, state, _ = job(steps, 3)
  starts = [line[2] for line in REPORTS]
  print(f'{where}: a flipped bit: both processes resume from {starts}')
  return int(any(codes) or state != whole or starts != ['2', '2'])


REPORTS = []  # of the last job: [word, digest, start, bytes, bytes] a process


def job(steps, num, *more, processes=PROCESSES, dies=None, slow=None):
  """Runs a job of `torture_saves.py`; its survivors end with the one that dies.

  Returns:
    (exit codes, digest of the final state, fewest whole steps at any moment
    after the second).
  """
  port = runs.free_port()
  started = []
  for i in range(processes):
    extra = more if i in (dies, slow) or (dies is slow is None) else ()
    started.append(
      subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).with_name(
          'torture_saves.py')), steps, str(num), str(port), str(i),
         str(processes), *extra],
        env=runs.environment(1), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
      )
    )  # fmt: skip
  least, most = 2, 0
  while any(p.poll() is None for p in started):
    # A step may come and one go between two entries of a folder.
    found = max(len(whole_steps(steps)) for _ in range(2))
    most = max(most, found)
    least = min(least, found) if most >= 2 else least
    if dies is not None and started[dies].poll() is not None:
      for process in started:
        process.kill()
    time.sleep(0.02)
  REPORTS[:] = []
  for process in started:
    printed, said = process.communicate()
    lines = [n.split() for n in printed.splitlines() if n.startswith('state ')]
    REPORTS.extend(lines)
    if dies is None and not lines:
      raise SystemExit(said[-2000:])
  codes = [process.returncode for process in started]
  return codes, REPORTS[0][1] if REPORTS else None, least


def tree(folder):
  from imagen_jax.io import files

  return files.tree(folder)


def whole_steps(folder):
  """The steps that have a manifest; of a bucket in one listing."""
  if '://' not in str(folder):
    return [p.parent.name for p in pathlib.Path(folder).glob('*/manifest.json')]
  names = (name.split('/') for name in tree(folder))
  return [n[0] for n in names if n[1:] == ['manifest.json']]


# ---- Faults ----------------------------------------------------------------
# (fault of torture_faults.py, limit in seconds, exit code, step that is saved)
FAULTS = (
  ('data:1:15', 0, 3, 14),  # the step before
  ('data:0:15', 0, 3, 14),
  ('bug:1:15', 0, 1, 10),
  ('bug:0:15', 0, 1, 10),
  ('save:1:10', 0, 2, 5),
  ('config:1:0', 0, 2, 0),
  ('init:1:0', 20, 1, 0),
  ('compile:1:0', 60, 1, 0),
  ('step:1:12', 10, 1, 5),  # it may stop in the save of 10
)


def faults(folder, args):
  """Both processes end with one exit code; `data` saves the step before."""
  print('fault        limit  exit codes  s after  checkpoint  the other said')
  failures = 0
  for fault, limit, code, step in FAULTS:
    kind, bad, _ = fault.split(':')
    if args.only and fault not in args.only:
      continue
    workdir, bad, stops = folder / fault, int(bad), limit > 0
    flags = ['--config.train.checkpoint_every=5']
    if stops:
      key = 'hang' if kind == 'step' else 'startup'
      flags.append(f'--config.train.{key}_seconds={limit}')
    jobs = runs.start(
      workdir, 1000, *flags, devices=1, processes=2, fault=fault
    )
    other = jobs[1 - bad].communicate()[0]
    if stops:
      jobs[bad].kill()  # it still stands
    mine = jobs[bad].communicate()[0]
    after = (
      time.time() - float(re.search(r'fault at ([\d.]+)', mine)[1]) - limit
    )
    codes = [job.returncode for job in jobs]
    saved = runs.newest(workdir)
    said = [line for line in other.splitlines() if line.startswith('error')]
    failures += jobs[1 - bad].returncode != code
    # Whether a save in progress is finished is a matter of milliseconds.
    failures += saved not in ((step, 10) if kind == 'step' else (step,))
    failures += after > 15 or len(said) != 1
    failures += not stops and len(set(codes)) > 1
    failures += not stops and f'process {bad} on host' not in said[0]
    print(
      f'{fault:12} {limit:5} {codes!s:>11} {after:8.1f} {saved:11}  '
      f'{said[0][7:57] if said else other[-2000:]} …',
      flush=True,
    )
  return failures


PARTS = {
  f.__name__: f
  for f in (cuts, damage, disk, memory, meshes, hosts, saves, faults)
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('parts', nargs='*', help=f'of {", ".join(PARTS)}')
  parser.add_argument(
    '--num', type=int, default=20, help='of cuts, or of saves'
  )
  parser.add_argument('--devices', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--damages', type=int, default=1000)
  parser.add_argument('--steps', type=int, default=5000, help='of memory')
  parser.add_argument(
    '--only',
    action='append',
    help='a row of meshes, or disk or bucket, of saves',
  )
  parser.add_argument('--patience', type=float, default=300, help='of hosts')
  args = parser.parse_args()
  failures = 0
  for name in args.parts or PARTS:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f'torture-{name}-'))
    start = time.perf_counter()
    try:
      failures += PARTS[name](folder, args)
    finally:
      shutil.rmtree(folder, ignore_errors=True)
    print(f'({name}: {time.perf_counter() - start:.0f} s)\n', flush=True)
  return int(failures > 0)


if __name__ == '__main__':
  sys.exit(main())
