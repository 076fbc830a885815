"""Ctrl-C at any moment: the command ends, without a traceback."""

import signal
import subprocess
import sys
import time

import pytest

from imagen_jax.cli import errors

COMMANDS = {
  # More images than any machine samples in two seconds.
  'sample.py': [
    '--prompt', 'a red circle', '--num_images', '64', '--out', 'OUT',
  ],
  'train.py': [
    '--config', 'shapes_base', '--config.text.path=demo', '--workdir', 'OUT',
  ],
  'evaluate.py': ['--suite', 'shapes', '--num', '4', '--out', 'OUT'],
}  # fmt: skip
# Python's own start, which may take long on a busy machine, is not ours.
BEGIN = """
import runpy, sys
print('begun', flush=True)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.parametrize('script', COMMANDS)
def test_at_every_moment_of_the_start(script, tmp_path):
  """jax's extension modules crash if an exception meets their import."""
  for number in range(9):
    words = [w.replace('OUT', f'{tmp_path}/{number}') for w in COMMANDS[script]]
    process = subprocess.Popen(
      [sys.executable, '-c', BEGIN, script, *words],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    assert process.stdout.readline() == 'begun\n'
    time.sleep(0.05 * 1.6**number)  # to 2 seconds
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert 'Traceback' not in printed, number
    assert process.returncode in (-signal.SIGINT, 130), (number, printed)


def test_one_that_a_library_swallows_is_repeated(capsys):
  """As where jax is called back while Python collects garbage."""

  class Swallowing:
    def __del__(self):
      raise KeyboardInterrupt

  def main(argv):
    thing = Swallowing()
    del thing
    time.sleep(20)

  begin = time.monotonic()
  assert errors.run(main, []) == 130
  assert time.monotonic() - begin < 5
  assert capsys.readouterr().err == 'interrupted\n'


def test_one_that_a_library_turns_into_its_own_error(capsys):
  """As where jax compares the static fields of two trees."""

  def main(argv):
    try:
      raise ValueError('cannot compare') from KeyboardInterrupt()
    except ValueError as error:
      raise RuntimeError('cannot trace') from error

  assert errors.run(main, []) == 130
  assert capsys.readouterr().err == 'interrupted\n'


def test_a_process_that_ignores_it_goes_on_ignoring_it():
  """As one that a shell started with &."""
  code = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from imagen_jax.cli import errors
def main(argv):
  errors.catch_interrupts()
  signal.raise_signal(signal.SIGINT)
sys.exit(errors.run(main))
"""
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
