"""The loss on pictures that are never trained on, with and without the EMA."""

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax import stage as stages
from imagen_jax.training.step import embed

NUM_BATCHES = 4


def make_heldout_loss(stage, text_module, batches, mesh, *, seed):
  """A function that computes the held-out loss, always with the same noise.

  Args:
    stage: the stage.
    text_module: the text encoder's module.
    batches: list of this process's batches, as `train_step` takes them.
    mesh: of the parameters.
    seed: of times and noise.

  Returns:
    (parameters, text parameters) -> mean loss over the batches, a float.
  """

  @jax.jit
  def loss(params, text_params, batch, number):
    # Off a number that no step has: the keys are not those of training.
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))
    key = jax.random.fold_in(key, number)
    text = embed(text_module, text_params, batch)
    values, _ = stages.loss(
      stage, params, key, batch['image'], text, batch['mask']
    )
    return jnp.mean(values)

  def heldout(params, text_params):
    losses = [
      loss(params, text_params, sharding.put_batch(batch, mesh), number)
      for number, batch in enumerate(batches)
    ]
    return float(sum(map(float, losses)) / len(losses))

  return heldout
