"""What the processes of a job tell one another when one of them fails."""

import time
import types

import jax
import pytest

from imagen_jax.errors import DataError, ImagenError, ModelError
from imagen_jax.training import peers


class FakeStore:
  """The key-value store of jax's coordination service."""

  def __init__(self):
    self.entries = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    if key in self.entries and not allow_overwrite:
      raise jax.errors.JaxRuntimeError('ALREADY_EXISTS')
    self.entries[key] = value

  def key_value_dir_get(self, folder):
    return [(k, v) for k, v in self.entries.items() if k.startswith(folder)]


@pytest.fixture
def pair(monkeypatch):
  """(two processes' Peers, the exit codes with which they would have ended)."""
  ended = []
  for name, seconds in dict(POLL=0.02, LEAVE=0.2, AGREE=1.0).items():
    monkeypatch.setattr(peers, name, seconds)
  monkeypatch.setattr(peers, '_exit_in', lambda *_: None)
  monkeypatch.setattr(peers.atexit, 'register', lambda *_: None)
  end = lambda self, failure: ended.append((self._me, failure.exit_code))
  monkeypatch.setattr(peers.Peers, '_end', end)
  store, both = FakeStore(), []
  for i in range(2):
    job = types.SimpleNamespace(
      client=store, process_id=i, num_processes=2, preemption_sync_manager=1
    )
    monkeypatch.setattr(peers.distributed, 'global_state', job)
    both.append(peers.Peers().__enter__())
  yield both, ended
  for one in both:
    one._failure = None
    one.__exit__(None, None, None)


def wait_for(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_an_error_of_one_process_is_raised_in_the_others(pair):
  (one, other), _ = pair
  one.raise_for(DataError('photo.jpg is damaged.'))
  one.check()  # its own is not another's
  wait_for(lambda: other._failure)
  with pytest.raises(peers.PeerError, match='process 0 on host') as caught:
    other.check()
  assert caught.value.exit_code == DataError.exit_code


def test_the_first_error_is_the_cause_of_those_that_follow(pair):
  (one, other), _ = pair
  one.raise_for(ModelError('the disk is full.'))
  with pytest.raises(peers.PeerError) as caught:
    other.raise_for(RuntimeError('a collective was aborted'))
  assert caught.value.exit_code == ModelError.exit_code


def test_a_process_that_was_killed_is_no_bug_of_the_others(pair):
  (one, _), _ = pair
  one.raise_for(jax.errors.JaxRuntimeError('INTERNAL: a bug'))
  one._failure, one._job.client.entries = None, {}
  with pytest.raises(ImagenError) as caught:
    one.raise_for(jax.errors.JaxRuntimeError('Connection reset by peer'))
  assert caught.value.exit_code == 1


def test_a_process_that_hangs_is_ended_but_not_in_a_save_with_the_failed_one(
  pair,
):
  (one, other), ended = pair
  saving = [True]
  with other.told(busy=lambda: saving[0], where=lambda: 'step 3'):
    one.raise_for(DataError('photo.jpg is damaged.'))
    wait_for(lambda: (0, 3) in ended)  # it is not busy
    time.sleep(0.4)
    assert (1, 3) not in ended
    one._write('left/0', '')  # its part of the save will never come
    wait_for(lambda: (1, 3) in ended)


def test_all_processes_stop_after_the_step_that_one_names(pair):
  (one, other), _ = pair
  error = DataError('photo.jpg is damaged.')
  one.stop_after(7, error)
  # The other knows as soon as this returns.
  assert [p.stops_after(7) for p in (one, other)] == [True, True]
  assert not other.stops_after(6)
  one.check_stop(7)
  with pytest.raises(peers.PeerError, match='after step 7') as caught:
    other.check_stop(7)
  assert caught.value.exit_code == DataError.exit_code
  with pytest.raises(OSError):  # the step is already chosen
    other.stop_after(8, OSError('late'))


def test_a_step_is_not_agreed_on_without_an_answer(pair, monkeypatch):
  (one, other), _ = pair
  monkeypatch.setattr(other, '_look', lambda: None)
  monkeypatch.setattr(peers, 'AGREE', 0.2)
  with pytest.raises(DataError):
    one.stop_after(7, DataError('photo.jpg is damaged.'))


def test_a_hang_names_the_process_that_does_not_answer(pair, capfd):
  (one, other), ended = pair
  wait_for(lambda: len(one._read('at')) == 2)
  other._left.set()  # its thread writes no longer
  time.sleep(0.1)
  one.abort('the step after 3 hangs.')
  printed = capfd.readouterr().err
  assert 'error: the step after 3 hangs.' in printed
  assert 'without an answer: process 1' in printed
  assert ended == [(0, 1)]


def test_a_job_of_one_process_has_no_peers():
  alone = peers.current()
  alone.check()
  alone.stop_after(3, OSError())
  assert not alone.stops_after(3)
  with pytest.raises(OSError), alone.told(busy=bool, where=str):
    raise OSError
