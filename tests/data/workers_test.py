"""Worker processes make the same batches, and end with what they work for."""

import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from imagen_jax.data.pipeline import Order, batches
from imagen_jax.errors import DataError, UsageError
from tests.data.pipeline_test import Captioned, Numbers, Pair, Shaped, jitter

ROOT = pathlib.Path(__file__).parents[2]


class Damaged(Numbers):
  """Number 3 is replaced, of which one note is too many."""

  def __init__(self):
    super().__init__()
    self.noted = []

  def __getitem__(self, i):
    if i == 3:
      self.note('three', 'it is damaged')
    return super().__getitem__(i)

  def note(self, name, reason):
    self.noted.append((name, reason))
    if len(self.noted) > 1:
      raise DataError('too many')


def assert_equal(one, other):
  assert one.keys() == other.keys()
  for key, value in one.items():
    assert value.dtype == other[key].dtype
    np.testing.assert_array_equal(value, other[key])


def halved(example):
  return {'half': example['image'] // 2, 'noise': example['noise']}


def test_a_worker_makes_the_same_batches_and_tells_what_is_bad():
  source, order = Damaged(), Order(3, 5, start_step=1)
  data = batches(source, order, augment=jitter, workers=1)
  here = batches(Numbers(), order, augment=jitter)
  assert_equal(next(data), next(here))  # the rest of the first epoch, or all
  with pytest.raises(DataError, match='too many'):
    for batch in itertools.islice(data, 6):
      assert_equal(batch, next(here))
  # Batches after that one may have been begun.
  assert source.noted[:2] == [('three', 'it is damaged')] * 2


def test_the_death_of_a_worker_is_one_sentence():
  before = {*multiprocessing.active_children()}
  data = batches(Numbers(), Order(3, 5), workers=1)
  next(data)
  (worker,) = {*multiprocessing.active_children()} - before
  os.kill(worker.pid, signal.SIGKILL)
  with pytest.raises(DataError, match='died'):
    for _ in range(100):
      next(data)


def test_a_source_that_cannot_be_copied_to_workers_is_the_users_mistake():
  source = Numbers()
  source.lock = threading.Lock()
  with pytest.raises(UsageError) as error:
    batches(source, Order(0, 4), workers=1)
  assert error.value.key == 'config.data.workers'


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2, 3])
@pytest.mark.parametrize('source', [Captioned(7), Shaped(), Pair()])
def test_batches_are_the_same_by_any_number_of_workers(workers, source):
  order = Order(5, 4, start_step=7, host=1, num_hosts=2)
  options = {'augment': jitter, 'transform': halved}
  here = batches(source, order, **options)
  there = batches(source, order, **options, workers=workers)
  for _ in range(40):
    assert_equal(next(here), next(there))


SCRIPT = """
import multiprocessing, time
from imagen_jax.data.pipeline import Order, batches
from tests.data.pipeline_test import Numbers

if __name__ == '__main__':
  data = batches(Numbers(), Order(0, 4), workers=2)
  next(data)
  pids = [child.pid for child in multiprocessing.active_children()]
  print(*pids, flush=True)
  time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  'harm', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
)
@pytest.mark.parametrize('group', [False, True])
def test_no_worker_outlives_its_run(harm, group, tmp_path):
  script = tmp_path / 'run.py'
  script.write_text(SCRIPT)
  with subprocess.Popen(
    [sys.executable, script],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    start_new_session=True,
  ) as run:
    try:
      pids = [*map(int, run.stdout.readline().split())]
      assert len(pids) == 2
      (os.killpg if group else os.kill)(run.pid, harm)
      run.wait(30)
    finally:
      run.kill()
  start = time.monotonic()
  while any(os.path.exists(f'/proc/{pid}') for pid in pids):
    assert time.monotonic() - start < 30
    time.sleep(0.1)
