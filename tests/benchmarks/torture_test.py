"""A short run of benchmarks/torture.py, whose exit code is 1 on failure."""

import pathlib
import subprocess
import sys

import pytest

PATH = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'torture.py'


def torture(*argv):
  done = subprocess.run(
    [sys.executable, str(PATH), *argv], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
def test_cuts_change_no_bit():
  printed = torture('cuts', '--num', '2', '--devices', '2')
  assert printed.splitlines()[1].split()[:4] == ['2', '2', '1', '1']


@pytest.mark.slow
def test_a_full_and_a_read_only_disk_leave_the_last_good_step():
  printed = torture('disk')
  if 'not run' in printed:
    pytest.skip(printed.strip())
  assert printed.count('step 5 intact: True') == 2


@pytest.mark.slow
def test_two_processes_compute_what_one_does():
  printed = torture('meshes', '--only', '2 processes, 2 × 4')
  assert len(printed.splitlines()) >= 3


@pytest.mark.slow
def test_a_signal_or_a_death_of_one_process_ends_both():
  printed = torture('hosts')
  assert 'SIGTERM to process 1: exit codes [143, 143]' in printed


@pytest.mark.slow
def test_two_processes_fail_together_and_a_hang_ends_the_other():
  printed = torture('faults')
  assert printed.count('[3, 3]') == 2 and printed.count('[1, 1]') == 2
