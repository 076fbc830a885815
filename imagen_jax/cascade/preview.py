"""Images while they are sampled."""

import concurrent.futures
import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Mapping

import numpy as np

EVERY = 4


@dataclasses.dataclass(frozen=True)
class Preview:
  """What a stage has after some of its steps.

  Attributes:
    stage: its name.
    first: index of the first of these images among those of the call.
    step: steps that are done.
    steps: all of them.
    z: uint8 [n, H, W, 3], the noisy images z_t, clipped to [−1, 1]; after the
      last step, x.
    x: uint8 [n, H, W, 3], the predictions x̂; after the last step, the images.
    images: the result of the call, {stage name: uint8 [N, H, W, 3]}, in its
      last preview; None before.
  """

  stage: str
  first: int
  step: int
  steps: int
  z: np.ndarray
  x: np.ndarray
  images: Mapping[str, np.ndarray] | None = None


Emit = Callable[[Preview], None]


class _Closed(Exception):
  """Nobody takes what would be emitted."""


def stream(
  work: Callable[[Emit], object], pool: concurrent.futures.Executor
) -> Generator[Preview, None, None]:
  """What `work(emit)` emits; it runs in another thread, one preview ahead.

  Closing the generator ends the work where it next emits, and waits for
  nothing.

  Args:
    work: to do.
    pool: whose thread does it, after what it was given before.
  """
  items: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()
  taken, closed = threading.Semaphore(0), threading.Event()

  def emit(preview: Preview) -> None:
    items.put(preview)
    taken.acquire()
    if closed.is_set():
      raise _Closed

  job = pool.submit(work, emit)
  job.add_done_callback(lambda job: items.put(None))
  try:
    while (preview := items.get()) is not None:
      taken.release()
      yield preview
  finally:
    job.cancel()  # if it has not started
    closed.set()
    taken.release()
  job.result()  # raises what the work did
