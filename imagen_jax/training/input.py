"""An experiment's batches, for training and for the held-out loss."""

from collections.abc import Iterator

import jax
import numpy as np

from imagen_jax.data.pipeline import Order, batches
from imagen_jax.training.experiment import Experiment


def train_batches(experiment: Experiment, start_step: int) -> Iterator[dict]:
  """This process's part of the batches after step `start_step`."""
  return _batches(experiment, 'train', start_step)


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
  )


def split_index(batch: dict) -> tuple[dict, np.ndarray]:
  """(the batch for the devices, the source indices of its examples)."""
  return {k: v for k, v in batch.items() if k != 'index'}, batch['index']
