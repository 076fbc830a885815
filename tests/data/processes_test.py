"""Work that processes share although some of them die or stall."""

import functools
import os
import pathlib
import signal
import time

from imagen_jax.data.processes import DIED, DONE, NEWS, share


def square(item, tell):
  tell(item, 'begun')
  return item * item


def once(item, tell, folder, harm):
  """`square`, but the first attempt at item 1 gets a signal."""
  mark = pathlib.Path(folder, 'harmed')
  if item == 1 and not mark.exists():
    mark.touch()
    os.kill(os.getpid(), harm)
  return square(item, tell)


def deadly(item, tell):
  if item == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  return square(item, tell)


def finished(events):
  return {number: value for kind, number, value in events if kind == DONE}


def test_a_killed_process_is_replaced_and_its_item_done_again(tmp_path):
  work = functools.partial(once, folder=tmp_path, harm=signal.SIGKILL)
  events = list(share(work, [0, 1, 2], 2))
  assert finished(events) == {0: 0, 1: 1, 2: 4}
  assert (NEWS, 2, (2, 'begun')) in events


def test_a_stopped_process_keeps_nobody_waiting(tmp_path):
  work = functools.partial(once, folder=tmp_path, harm=signal.SIGSTOP)
  start = time.monotonic()
  assert finished(share(work, range(4), 2, patience=0.5)) == {
    0: 0, 1: 1, 2: 4, 3: 9
  }  # fmt: skip
  assert time.monotonic() - start < 60


def test_an_item_that_kills_every_process_is_given_up():
  events = list(share(deadly, [0, 1, 2], 1))
  assert finished(events) == {0: 0, 2: 4}
  assert (DIED, 1, None) in events
