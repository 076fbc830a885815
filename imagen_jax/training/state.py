"""The training state: parameters, EMA, optimizer state and counters."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from imagen_jax.training import power_ema


@flax.struct.dataclass
class TrainState:
  """The state of training, all of which a checkpoint saves.

  Attributes:
    step: int32, steps taken; the keys derive from it.
    params: float32 parameters.
    ema_params: their exponential moving average, used for sampling.
    emas: {length: their power-function EMA}, see `power_ema`.
    opt_state: the optimizer's.
    skipped: int32, steps skipped so far because of NaN or Inf.
    skipped_in_row: int32, consecutive skipped steps up to the latest.
  """

  # Arrays, or their shapes or shardings where a tree describes a state.
  step: Any
  params: Any
  ema_params: Any
  emas: Any
  opt_state: Any
  skipped: Any
  skipped_in_row: Any


def init_state(
  params: Any,
  tx: optax.GradientTransformation,
  ema_lengths: Sequence[float] | None = None,
) -> TrainState:
  """The state before the first step, with power-function EMAs of lengths."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    emas=power_ema.start(params, ema_lengths),
    opt_state=tx.init(params),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_row=jnp.zeros((), jnp.int32),
  )


def ema_decay(step: jax.Array, limit: float) -> jax.Array:
  """EMA decay after n steps, with warm-up: min(limit, (1 + n)/(10 + n))."""
  step = step.astype(jnp.float32)
  return jnp.minimum(limit, (1 + step) / (10 + step))
