"""Two processes of a job: what they must have in common, and what they keep."""

import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from benchmarks import torture_runs
from imagen_jax.io.checkpoint import Checkpoints

pytestmark = pytest.mark.slow


def start(workdirs, *flags, each=((), ())):
  """Starts a job of two processes, with a workdir and flags for each."""
  together = [f'--coordinator=127.0.0.1:{torture_runs.free_port()}']
  together += ['--num_processes=2', *flags]
  return [
    subprocess.Popen(
      torture_runs.command(
        workdirs[i], 12, *together, *each[i], f'--process_id={i}'
      ),
      env=torture_runs.environment(1),
      cwd=torture_runs.ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]


def ended(jobs):
  """(exit codes, the lines of errors) of all processes."""
  printed = [job.communicate(timeout=300)[0] for job in jobs]
  lines = [
    [line for line in text.splitlines() if line.startswith('error: ')]
    for text in printed
  ]
  assert all(len(each) == 1 for each in lines), printed
  return [job.returncode for job in jobs], [each[0] for each in lines]


def test_a_workdir_that_is_not_shared_is_refused_at_the_start(tmp_path):
  codes, errors = ended(start([tmp_path / 'a', tmp_path / 'b']))
  assert codes == [2, 2]
  assert all('--workdir' in error for error in errors)
  assert not (tmp_path / 'a' / 'config.json').exists()
  assert not (tmp_path / 'b' / 'config.json').exists()


def test_processes_that_train_different_things_are_refused(tmp_path):
  other = '--config.train.optimizer.learning_rate=2e-3'
  codes, errors = ended(start([tmp_path] * 2, each=((), (other,))))
  assert codes == [2, 2]
  assert all('learning_rate' in error for error in errors)
  assert not (tmp_path / 'config.json').exists()


def test_after_a_kill_the_job_resumes_from_its_local_disks_to_the_bit(tmp_path):
  flags = ['--config.train.checkpoint_every=100']
  local = ['--config.train.local_checkpoint_every=2']
  local += [f'--config.train.local_checkpoint_dir={tmp_path / "local"}']
  workdir, whole = tmp_path / 'run', tmp_path / 'whole'
  jobs = start([workdir] * 2, *flags, *local)
  while torture_runs.last_step(workdir) < 7:
    assert all(job.poll() is None for job in jobs), jobs[0].communicate()[0]
    time.sleep(0.05)
  for job in jobs:
    job.send_signal(signal.SIGKILL)
  for job in jobs:
    job.communicate()
  assert not list((workdir / 'checkpoints').glob('[0-9]*'))
  printed = [j.communicate()[0] for j in start([workdir] * 2, *flags, *local)]
  assert 'resumes after step' in printed[0], printed
  assert not list((tmp_path / 'local').glob('*/*/*')), 'it is kept at the end'
  for job in start([whole] * 2, *flags):
    assert job.communicate() and job.returncode == 0
  states = []
  for folder in (workdir, whole):
    with Checkpoints(folder / 'checkpoints') as checkpoints:
      assert checkpoints.latest_step() == 12
      states.append(checkpoints.restore_subtree('params')[0])
  jax.tree.map(np.testing.assert_array_equal, *states)
