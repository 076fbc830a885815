"""How long steps take on the devices, and which host holds them up.

Steps are dispatched ahead of the devices, and all hosts finish a step together,
so neither the time of a dispatch nor that of a step tells a slow host. What is
its own is how long its devices stood idle because it had not dispatched their
next step: from the end of a step, or from the moment it asked for the batch if
that was later, until the next step is ready to go.
"""

import queue
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

Hosts = Float[np.ndarray, 'hosts 3']  # the mean `Step` of each host

SLOW = 1.3  # times the median


class Step(NamedTuple):
  """Seconds of one step.

  Attributes:
    total: from the end of the step before it, or from the request for its
      batch if that was later, to its end.
    data: the part of `total` in which the devices waited for the batch.
    host: the part in which they waited for this host, `data` included.
  """

  total: float
  data: float
  host: float


class SlowHost(NamedTuple):
  """A host that holds up the others.

  Attributes:
    host: its process number.
    ratio: its seconds per step, waiting for others excluded, over the median.
    data: fraction of what it adds to a step that is waiting for data.
  """

  host: int
  ratio: float
  data: float


class Pace:
  """Waits in a thread for the end of each step, so that the run need not."""

  def __init__(self) -> None:
    self._dispatched: queue.Queue[Any] = queue.Queue()
    self._steps: list[Step] = []

  def __enter__(self) -> Self:
    threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._dispatched.put(None)

  def dispatched(self, times: tuple[float, float, float], values: Any) -> None:
    """Records a step that was dispatched.

    Args:
      times: `time.perf_counter()` when its batch was asked for, when it was
        there, and when it was on the devices.
      values: its results, which are not donated.
    """
    self._dispatched.put((times, values))

  def take(self) -> list[Step]:
    """The steps since the last call; waits for those still running."""
    self._dispatched.join()
    steps, self._steps = self._steps, []
    return steps

  def _watch(self) -> None:
    last = 0.0
    while (item := self._dispatched.get()) is not None:
      (asked, there, ready), values = item
      try:
        jax.block_until_ready(values)
      except Exception:  # the run meets it when it reads the metrics
        pass
      begin, last = max(asked, last), time.perf_counter()
      self._steps.append(
        Step(last - begin, max(0.0, there - begin), max(0.0, ready - begin))
      )
      del values, item
      self._dispatched.task_done()


def gather(steps: Sequence[Step]) -> Hosts | None:
  """The mean `Step` of each host; None without steps.

  Every process calls it, with its own steps.
  """
  if not steps:
    return None
  mine = np.mean(steps, axis=0)[None]
  if jax.process_count() == 1:
    return mine
  return multihost_utils.process_allgather(mine, tiled=True)


def find_slow(hosts: Hosts) -> SlowHost | None:
  """The slowest host if it takes `SLOW` times as long as the median one.

  A device that is slow holds up all hosts alike: only a profile shows it.
  """
  total, data, late = np.asarray(hosts, np.float64).T
  # The host that is last waits for no other: its devices only compute.
  own = late + (total - late).min()
  worst, median = int(own.argmax()), statistics.median_low(own)
  ratio = own[worst] / max(median, 1e-9)
  if ratio <= SLOW:
    return None
  return SlowHost(worst, ratio, data[worst] / late[worst])
