"""The held-out loss: the mean loss on examples that are not trained on."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax.training.experiment import Experiment
from imagen_jax.training.input import eval_batches, split_index
from imagen_jax.training.step import condition_key

NUM_BATCHES = 4


def make_heldout_loss(
  experiment: Experiment, frozen: Any
) -> Callable[[Any], float]:
  """A function that computes the held-out loss, with the same noise each time.

  Args:
    experiment: the `Experiment`.
    frozen: its frozen arrays, on the mesh.

  Returns:
    parameters -> their mean loss over a few batches.
  """
  batches = [
    split_index(batch)[0]
    for batch in itertools.islice(eval_batches(experiment), NUM_BATCHES)
  ]

  @jax.jit
  def loss(params: Any, batch: dict, number: int, frozen: Any) -> jax.Array:
    # No step has this number, so the keys are not those of training.
    key = jax.random.fold_in(
      jax.random.key(experiment.config.seed), np.uint32(2**32 - 1)
    )
    key = jax.random.fold_in(key, number)
    batch = experiment.condition(condition_key(key), batch, frozen)
    return jnp.mean(experiment.loss(params, key, batch, frozen)[0])

  def heldout(params: Any) -> float:
    losses = [
      loss(params, sharding.put_batch(batch, experiment.mesh), number, frozen)
      for number, batch in enumerate(batches)
    ]
    return sum(map(float, losses)) / len(losses)

  return heldout
