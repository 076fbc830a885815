"""An experiment's batches, for training and for the held-out loss."""

import collections
from collections.abc import Iterator
from typing import Self

import jax
import numpy as np

from imagen_jax.data.pipeline import Order, batches
from imagen_jax.training.experiment import Experiment


def train_batches(experiment: Experiment, start_step: int) -> Iterator[dict]:
  """This process's part of the batches after step `start_step`."""
  return _batches(experiment, 'train', start_step)


class Ahead:
  """Batches, fetched some steps before they are used.

  When one cannot be read there are steps left, in which all processes agree on
  one to save. The error is kept; it is raised in the place of the batch.

  Attributes:
    error: of the batch after those that are left; None: there is none.
  """

  def __init__(self, batches: Iterator[dict], num: int) -> None:
    """Takes the batches, and how many are fetched beyond the current one."""
    self.error: Exception | None = None
    self._batches, self._num = batches, num
    self._fetched: collections.deque[dict] = collections.deque()

  def __iter__(self) -> Self:
    return self

  def __len__(self) -> int:
    """How many more batches there are, as far as is known."""
    return len(self._fetched)

  def __next__(self) -> dict:
    while self.error is None and len(self._fetched) <= self._num:
      try:
        self._fetched.append(next(self._batches))
      except Exception as error:  # StopIteration after the last batch, too
        self.error = error
    if self.error is not None and not self._fetched:
      raise self.error
    return self._fetched.popleft()


def eval_batches(experiment: Experiment) -> Iterator[dict]:
  """This process's part of the batches of the eval split."""
  return _batches(experiment, 'eval')


def _batches(
  experiment: Experiment, split: str, start_step: int = 0
) -> Iterator[dict]:
  order = Order(
    seed=experiment.config.seed,
    batch_size=experiment.config.train.batch_size,
    start_step=start_step,
    host=jax.process_index(),
    num_hosts=jax.process_count(),
  )
  source = experiment.source(split)
  return batches(
    source,
    order,
    augment=experiment.augmentation(split),
    transform=experiment.example,
    workers=experiment.workers(split),
  )


def split_index(batch: dict) -> tuple[dict, np.ndarray]:
  """(the batch for the devices, the source indices of its examples)."""
  return {k: v for k, v in batch.items() if k != 'index'}, batch['index']
