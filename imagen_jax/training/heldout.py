"""The loss on images that are never trained on, with and without the EMA."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax.training.run import split_index

NUM_BATCHES = 4


def make_heldout_loss(run):
  """A function that computes the held-out loss, always with the same noise.

  Args:
    run: the `Run`.

  Returns:
    parameters -> their mean loss over a few batches, a float.
  """
  stream = run.stream(run.images('eval'))
  batches = [
    split_index(batch)[0] for batch in itertools.islice(stream, NUM_BATCHES)
  ]

  @jax.jit
  def loss(params, batch, number, frozen):
    # Off a number that no step has: the keys are not those of training.
    key = jax.random.fold_in(
      jax.random.key(run.config.seed), np.uint32(2**32 - 1)
    )
    key = jax.random.fold_in(key, number)
    return jnp.mean(run.loss(params, key, batch, frozen))

  def heldout(params):
    losses = [
      loss(params, sharding.put_batch(batch, run.mesh), number, run.frozen)
      for number, batch in enumerate(batches)
    ]
    return float(sum(map(float, losses)) / len(losses))

  return heldout
