"""What training carries from step to step: parameters, EMA, optimizer."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """The state of one stage's training, all of it saved in a checkpoint.

  Attributes:
    step: int32, steps taken; it also numbers the batches and the keys.
    params: float32 parameters.
    ema_params: their exponential moving average, the ones that are sampled.
    opt_state: the optimizer's.
    skipped: int32, steps left out so far because of NaN or Inf.
    skipped_in_row: int32, how many of them are the latest steps.
  """

  # Arrays; in trees that describe a state, their shapes or shardings.
  step: Any
  params: Any
  ema_params: Any
  opt_state: Any
  skipped: Any
  skipped_in_row: Any


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first step; `tx` is `optimizer(...)`'s."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=tx.init(params),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_row=jnp.zeros((), jnp.int32),
  )


def ema_decay(step: jax.Array, limit: float) -> jax.Array:
  """min(limit, (1 + n)/(10 + n)): an average that forgets its start soon."""
  step = step.astype(jnp.float32)
  return jnp.minimum(limit, (1 + step) / (10 + step))
