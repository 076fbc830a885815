"""However a set is prepared, and whatever happens, it has the same bytes.

The commands run as processes of their own, which are killed and stopped.
"""

import importlib.util
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.data.prepare_test import tree
from tests.data.webdataset_test import encoded, pixels, write

KILLS = 200
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def tars(tmp_path_factory):
  """24 tars of 64 images, some of them bad or duplicates."""
  folder = tmp_path_factory.mktemp('tars')
  for n in range(24):
    members = []
    for i in range(64):
      side = 80 if i % 9 else 40
      seed = 7 if i % 11 == 0 else 100 * n + i
      data = encoded(pixels(seed, side, side), 'JPEG')
      members += [(f'{i:02d}.jpg', data), (f'{i:02d}.txt', b'some noise')]
    write(folder / f'{n:05d}.tar', members + [('mute.jpg', data)])
  return folder


def start(tars, out, *more):
  """The command; a lost tar of the 24 is more than it takes."""
  command = [sys.executable, '-m', 'imagen_jax.cli.prepare', '--out', str(out)]
  if '--merge' not in more:
    command += ['--source', 'webdataset', '--path', str(tars), '--size', '64']
  command += ['--max_bad', '0.02', *map(str, more)]
  quiet = subprocess.DEVNULL
  return subprocess.Popen(command, stdout=quiet, stderr=quiet)


def run(tars, out, *more):
  assert start(tars, out, *more).wait() == 0


@pytest.fixture(scope='module')
def whole(tars, tmp_path_factory):
  """What one process makes."""
  out = tmp_path_factory.mktemp('whole') / 'out'
  run(tars, out, '--workers', 1)
  return tree(out)


def children(process):
  """The processes that a process has started."""
  found = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children')
  try:
    return [int(pid) for pid in found.read_text().split()]
  except OSError:
    return []


def kill(pid, number):
  try:
    os.kill(pid, number)
    return True
  except ProcessLookupError:
    return False


@pytest.mark.parametrize('workers', [2, 4])
def test_any_number_of_workers_makes_the_same_bytes(
  tars, whole, tmp_path, workers
):
  run(tars, tmp_path / 'out', '--workers', workers)
  assert tree(tmp_path / 'out') == whole


def test_jobs_that_run_at_once_make_the_same_bytes(tars, whole, tmp_path):
  out = tmp_path / 'out'
  jobs = [start(tars, out, '--shard', f'{i}/3') for i in range(3)]
  assert [job.wait() for job in jobs] == [0, 0, 0]
  run(tars, out, '--merge')
  assert tree(out) == whole


@pytest.mark.skipif(
  importlib.util.find_spec('apache_beam') is None,
  reason="needs pip install 'imagen_jax[beam]'",
)
def test_beam_makes_the_same_bytes(tars, whole, tmp_path):
  run(tars, tmp_path / 'out', '--runner', 'DirectRunner', '--workers', 2)
  assert tree(tmp_path / 'out') == whole


def test_kills_at_any_moment_leave_the_same_bytes(tars, whole, tmp_path):
  rng, kills, rounds = random.Random(0), 0, 0
  while kills < KILLS:
    out, process = tmp_path / str(rounds), None
    code = None
    while code != 0:
      process = start(tars, out, '--workers', 3)
      while process.poll() is None:
        time.sleep(rng.uniform(0.05, 0.9))
        if kills < KILLS:
          workers = children(process)
          # One in eight is the command itself, which leaves its workers.
          one = rng.choice(workers) if workers and rng.random() < 7 / 8 else 0
          kills += kill(one or process.pid, signal.SIGKILL)
      code = process.wait()
      assert code in (0, 3, -signal.SIGKILL)
    time.sleep(2)  # for workers whose command was killed
    run(tars, out, '--merge')
    assert tree(out) == whole
    rounds += 1
  print(f'{kills} kills in {rounds} sets')


def test_a_stopped_worker_holds_nobody_up(tars, whole, tmp_path):
  out = tmp_path / 'out'
  process = start(tars, out, '--workers', 2)
  while not children(process) or not list(out.glob('.part-*')):
    time.sleep(0.02)
  time.sleep(0.5)
  [*_, stopped] = children(process)
  assert kill(stopped, signal.SIGSTOP)
  assert process.wait(timeout=240) == 0
  assert tree(out) == whole


def test_a_second_attempt_while_the_first_is_stopped_does_no_harm(
  tars, whole, tmp_path
):
  out = tmp_path / 'out'
  first = start(tars, out, '--shard', '0/2', '--workers', 1)
  while not list(out.glob('.part-*')):
    time.sleep(0.005)
  assert kill(first.pid, signal.SIGSTOP)
  for i in (1, 0):
    run(tars, out, '--shard', f'{i}/2')
  run(tars, out, '--merge')
  assert tree(out) == whole
  assert kill(first.pid, signal.SIGCONT)
  assert first.wait() == 0
  assert tree(out) == whole
