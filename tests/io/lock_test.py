"""One process at a time writes to a folder."""

import subprocess
import sys
import threading

import pytest

from imagen_jax.errors import UsageError
from imagen_jax.io.lock import FILE, locked

HOLD = """
import sys
from imagen_jax.io.lock import locked
with locked(sys.argv[1]):
  print('locked', flush=True)
  sys.stdin.read()
"""


def holder(folder):
  """A process that holds the lock until its stdin is closed."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, folder],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'locked\n'
  return process


def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path):
  first = holder(tmp_path / 'w')
  with pytest.raises(UsageError) as error, locked(tmp_path / 'w', key='out'):
    pass
  assert error.value.key == 'out' and str(first.pid) in str(error.value)
  first.communicate('')
  assert first.returncode == 0


def test_a_killed_process_holds_no_lock(tmp_path):
  first = holder(tmp_path)
  first.kill()
  first.wait()
  assert (tmp_path / FILE).exists()
  with locked(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_once_in_a_process_too(tmp_path):
  with locked(tmp_path):
    with pytest.raises(UsageError), locked(tmp_path):
      pass
    with locked(tmp_path, name='other'):
      pass
  with locked(tmp_path):
    pass


def test_who_waits_goes_on_when_the_lock_is_released(tmp_path):
  counts = []

  def add():
    for _ in range(50):
      with locked(tmp_path, wait=True):
        count = len(counts)
        counts.append(count)

  threads = [threading.Thread(target=add) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert counts == list(range(200))


def test_a_file_cannot_be_locked_as_a_folder(tmp_path):
  (tmp_path / 'w').touch()
  for folder in (tmp_path / 'w', tmp_path / 'w' / 'deeper'):
    with pytest.raises(UsageError), locked(folder):
      pass
