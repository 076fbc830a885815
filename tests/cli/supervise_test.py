"""imagen-supervise: which ends are final, signals, and outliving a terminal."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from imagen_jax.cli import supervise

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = [sys.executable, '-m', 'imagen_jax.cli.supervise']
# Says that it runs; on SIGTERM it saves and ends with 143.
JOB = 'trap "echo saved; exit 143" TERM; echo started; sleep 60 & wait'


@pytest.fixture
def handlers():
  numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  old = {number: signal.getsignal(number) for number in numbers}
  yield
  for number, handler in old.items():
    signal.signal(number, handler)


def runs(folder, codes, *, max_restarts=50):
  """(exit code of all, number of runs) of a job that ends in turn with these.

  A code below 0 is a signal that the job sends itself.
  """
  log = folder / 'log'
  job = f'echo x >> {log}; set -- {" ".join(map(str, codes))}; '
  job += f'shift $(($(wc -l < {log}) - 1)); '
  job += 'case $1 in -*) kill $1 $$;; *) exit $1;; esac'
  code = supervise.Supervisor(['sh', '-c', job]).run(max_restarts, 0.01)
  return code, len(log.read_text().splitlines())


@pytest.mark.parametrize('code', [1, 4, 5, 134, 137, 143, -6, -9, -15])
def test_a_job_that_failed_or_was_killed_runs_again(handlers, tmp_path, code):
  assert runs(tmp_path, [code, code, 0]) == (0, 3)


@pytest.mark.parametrize('code', [0, 2, 3, 130])
def test_a_users_mistake_and_an_interrupt_are_final(handlers, tmp_path, code):
  assert runs(tmp_path, [1, code, 0]) == (code, 2)


def test_failures_are_limited_and_preemptions_that_saved_are_none(
  handlers, tmp_path
):
  assert runs(tmp_path, [143] * 5 + [1] * 5, max_restarts=2) == (1, 8)


def test_each_delay_is_twice_the_last_up_to_a_limit(
  handlers, tmp_path, monkeypatch
):
  slept = []
  monkeypatch.setattr(
    supervise.Supervisor, '_sleep', lambda self, seconds: slept.append(seconds)
  )
  assert supervise.Supervisor(['false']).run(6, 10) == 1
  assert slept == [10, 20, 40, 80, 120, 120]


def wait_for(path, word):
  end = time.monotonic() + 20
  while word not in (path.read_text() if path.exists() else ''):
    assert time.monotonic() < end, f'{word} did not come'
    time.sleep(0.02)


@pytest.mark.parametrize(
  'number,code', [('TERM', 143), ('HUP', 143), ('INT', 130)]
)
def test_a_signal_is_passed_on_and_ends_both(tmp_path, number, code):
  out = tmp_path / 'out'
  job = JOB.replace('" TERM', '" TERM; trap "exit 130" INT')
  with open(out, 'w') as file:
    process = subprocess.Popen([*COMMAND, '--', 'sh', '-c', job], stdout=file)
  wait_for(out, 'started')
  process.send_signal(getattr(signal, f'SIG{number}'))
  assert process.wait(timeout=20) == code
  assert ('saved' in out.read_text()) == (code == 143)


def test_what_a_job_leaves_behind_does_not_outlive_it(handlers, tmp_path):
  pid = tmp_path / 'pid'
  job = f'sleep 60 & echo $! > {pid}'
  assert supervise.Supervisor(['sh', '-c', job]).run(1, 1) == 0
  status = pathlib.Path(f'/proc/{pid.read_text().strip()}/status')
  end = time.monotonic() + 5
  while status.exists() and 'Z (zombie)' not in status.read_text():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_a_detached_job_outlives_its_terminal_and_runs_once(tmp_path):
  log = tmp_path / 'logs' / 'job'
  command = [*COMMAND, '--detach', str(log), '--', 'sh', '-c', JOB]
  terminal = subprocess.Popen(
    command, stdout=subprocess.DEVNULL, start_new_session=True
  )
  wait_for(log, 'started')
  os.killpg(terminal.pid, signal.SIGKILL)
  terminal.wait()
  again = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  time.sleep(0.5)
  assert again.poll() is None  # it follows
  supervisor = log.read_text().partition('process ')[2].partition(';')[0]
  os.kill(int(supervisor), signal.SIGTERM)
  printed, _ = again.communicate(timeout=20)
  assert again.returncode == 143 and 'saved' in printed
  assert log.read_text().count('started') == 1


def test_the_exit_code_of_an_earlier_job_is_not_that_of_this_one(tmp_path):
  log = tmp_path / 'job'
  log.write_text(f'process 1; {supervise.BEGUN}\n{supervise.ENDED} 0\n')
  command = [*COMMAND, '--detach', str(log), '--', 'sh', '-c', JOB]
  first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  wait_for(log, 'started')
  second = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  time.sleep(0.5)
  assert second.poll() is None  # it follows
  supervisor = log.read_text().rpartition('process ')[2].partition(';')[0]
  children = f'/proc/{supervisor}/task/{supervisor}/children'
  (job,) = pathlib.Path(children).read_text().split()
  os.kill(int(supervisor), signal.SIGKILL)
  os.killpg(int(job), signal.SIGKILL)
  assert [p.wait(timeout=20) for p in (first, second)] == [1, 1]


@pytest.mark.parametrize(
  'argv',
  [
    [],
    ['--'],
    ['--', 'no-such-command'],
    ['--max_restarts', '0', '--', 'true'],
  ],
)
def test_a_mistake_is_refused_before_anything_starts(argv):
  assert supervise.main(argv) == 2


@pytest.mark.slow
def test_two_processes_one_killed_under_supervisors_end_bit_equal(
  tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(ROOT / 'benchmarks')
  import torture_runs as runs

  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  more = ['--config.train.checkpoint_every=7']
  for job in runs.start(whole, 40, *more, devices=1, processes=2):
    assert job.wait(timeout=300) == 0
  more += [f'--coordinator=127.0.0.1:{runs.free_port()}', '--num_processes=2']
  jobs = [
    subprocess.Popen(
      [*COMMAND, '--backoff=1', '--']
      + runs.command(cut, 40, *more, f'--process_id={i}'),
      env=runs.environment(1),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  while runs.last_step(cut) < 17:
    assert all(job.poll() is None for job in jobs)
    time.sleep(0.05)
  children = pathlib.Path(f'/proc/{jobs[1].pid}/task/{jobs[1].pid}/children')
  os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
  printed = [job.communicate(timeout=500)[0] for job in jobs]
  assert [job.returncode for job in jobs] == [0, 0], printed
  assert 'exit code 137' in printed[1] and 'exit code' in printed[0]
  (step, mine, _), (_, theirs, _) = runs.states(cut), runs.states(whole)
  assert step == 40 and runs.differing_bits(mine, theirs) == 0
  assert runs.losses(cut) == runs.losses(whole)
