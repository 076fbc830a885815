"""The processes in which `accelerator.py` measures its rows."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from accelerator_results import Answer, Results
from accelerator_rows import Group

NO_TIME = 'no time'
# Fraction of a GPU's memory that jax takes; base64 needs most of it.
MEMORY = '0.92'
HERE = pathlib.Path(__file__).parent


class Processes:
  """The processes of groups: their environment, log and end.

  Args:
    folder: for the compile cache and the log.
    rehearse: with tiny work, on a CPU.
    deadline: `time.monotonic()` at which a process is ended.
  """

  def __init__(
    self, folder: pathlib.Path, rehearse: bool, deadline: float
  ) -> None:
    self._folder, self._rehearse = folder, rehearse
    self.deadline = deadline

  def left(self) -> float:
    """Seconds until the deadline."""
    return self.deadline - time.monotonic()

  def run(
    self, group: Group, names: Sequence[str], on: Callable[[Answer], None]
  ) -> str:
    """Runs a process that measures rows of a group.

    Args:
      group: the group.
      names: of the rows.
      on: called with each of its answers.

    Returns:
      why rows have no answer, if some have none.
    """
    rows = {name: group.rows[name].given for name in names}
    told = {
      'module': group.module,
      'rows': rows,
      'flags': group.flags,
      'rehearse': self._rehearse,
    }
    with (self._folder / 'log.txt').open('a+b') as log:
      begin = log.seek(0, os.SEEK_END)
      process = subprocess.Popen(
        [sys.executable, str(HERE / 'accelerator.py'), '--serve'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=self._environment(group),
        start_new_session=True,
      )
      late = threading.Event()
      end = threading.Timer(max(self.left(), 0.0), _end, [process, late])
      end.start()
      try:
        process.stdin.write(json.dumps(told).encode())
        process.stdin.close()
        for line in process.stdout:
          on(json.loads(line))
        code = process.wait()
      finally:
        end.cancel()
        _end(process)
      log.seek(begin)
      said = log.read().decode(errors='replace')
    return NO_TIME if late.is_set() else _last_words(code, said)

  def _environment(self, group: Group) -> dict[str, str]:
    flags = f'{os.environ.get("XLA_FLAGS", "")} {group.flags}'.strip()
    made = {
      'JAX_COMPILATION_CACHE_DIR': str(self._folder / 'compiled'),
      'CUDA_VISIBLE_DEVICES': '0',
      'XLA_PYTHON_CLIENT_MEM_FRACTION': MEMORY,
      'TF_CPP_MIN_LOG_LEVEL': '2',
      **os.environ,
      'XLA_FLAGS': flags,
      'HF_HUB_OFFLINE': '1',
    }
    if group.module == 'torch':
      made['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
    if group.runs > 1:  # each chooses its own kernels
      made['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
    if self._rehearse:
      made |= {'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    return made


def _end(
  process: subprocess.Popen, late: threading.Event | None = None
) -> None:
  """Ends a process and those that it has started."""
  if late is not None:
    late.set()
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _last_words(code: int, said: str) -> str:
  """Why a process ended, from its exit code and what it wrote."""
  lines = [line.strip() for line in said.splitlines() if line.strip()]
  last = f': {lines[-1][:200]}' if code and lines else ''
  return f'the process ended with {code}{last}'


def measure(
  groups: Sequence[Group], results: Results, processes: Processes
) -> None:
  """Measures the rows of groups, in turn, and adds them to the results."""
  for group in groups:
    names = [*group.rows]
    while names:  # a process that dies takes one row with it
      names = _measure(group, names, results, processes)


def _measure(
  group: Group, names: Sequence[str], results: Results, processes: Processes
) -> list[str]:
  """Measures rows of a group in a process; returns those to try again."""
  answers: dict[str, list[Answer]] = {name: [] for name in names}
  why, began = NO_TIME, False

  def add(name: str, answer: Answer) -> None:
    row = group.rows[name]
    results.add(name, {'work': row.work, 'kind': row.kind, **answer})

  def on(answer: Answer) -> None:
    nonlocal began
    if 'machine' in answer:
      began = True
      results.on(answer['machine'])
      return
    name = answer.pop('row')
    answers[name].append(answer)
    whole = joined(answers[name], group.runs)
    if whole is not None:
      add(name, whole)

  def missing() -> list[str]:
    return [n for n in names if joined(answers[n], group.runs) is None]

  for _ in range(group.runs):
    if not missing():
      break
    if processes.left() < (0 if results.rehearsal else group.least):
      why = NO_TIME
      break
    why = processes.run(group, missing(), on)
    if why == NO_TIME:
      break
  lost = missing() if why == NO_TIME or not began else missing()[:1]
  again = missing()[len(lost) :]
  for name in lost:
    add(name, {'left_out': why})
  return again


def joined(answers: Sequence[Answer], runs: int) -> Answer | None:
  """What a row's processes have answered; None if one has yet to."""
  for answer in answers:
    if 'left_out' in answer:
      return answer
  if len(answers) < runs:
    return None
  if runs == 1:
    return answers[0]
  return {'runs': [answer['run'] for answer in answers]}
