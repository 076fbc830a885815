"""What training carries from step to step: parameters, EMA, optimizer."""

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

  step: jax.Array
  params: dict
  ema_params: dict
  opt_state: optax.OptState
  skipped: jax.Array
  skipped_in_row: jax.Array


def init_state(params, tx):
  """The state before the first step; `tx` is `optimizer(...)`'s."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=tx.init(params),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_row=jnp.zeros((), jnp.int32),
  )


def learning_rate(*, peak, warmup, decay_steps=None):
  """Linear warm-up to `peak`, then constant or a cosine to 0 (F.1).

  Args:
    peak: the highest rate (1e-4 in the paper).
    warmup: steps of warm-up (10,000 in the paper); a decaying run shorter
      than ten of them, such as a trial, warms up for a tenth of itself.
    decay_steps: the step at which the cosine reaches 0, warm-up included;
      None holds the peak. The paper's listing prints an end value of
      2,500,000, its number of steps, where 0 is meant.

  Returns:
    a function of the step.
  """
  if decay_steps is None:
    return optax.linear_schedule(peak / max(warmup, 1), peak, warmup)
  warmup = min(warmup, decay_steps // 10)
  return optax.warmup_cosine_decay_schedule(
    init_value=peak / max(warmup, 1),
    peak_value=peak,
    warmup_steps=warmup,
    decay_steps=decay_steps,
    end_value=0.0,
  )


def optimizer(rate, *, kind='adam', clip=1.0, **options):
  """Adam or Adafactor behind a clip of the global norm (4.1, F.1–F.3).

  Args:
    rate: learning rate, a number or a function of the step.
    kind: 'adam' (super-resolution: "Adafactor hurt model quality"), or
      'adafactor' (the base model's, for its memory). optax's Adafactor
      multiplies the rate by the parameter's RMS; a zero-initialised layer
      then takes some 10,000 steps of 1e-4 to leave zero, so that
      `multiply_by_parameter_scale=False` is advised for short runs.
    clip: largest global norm of the gradient; None does not clip.
    **options: for `optax.adam` or `optax.adafactor`.

  Returns:
    an `optax.GradientTransformation`.
  """
  make = {'adam': optax.adam, 'adafactor': optax.adafactor}[kind]
  steps = [] if clip is None else [optax.clip_by_global_norm(clip)]
  return optax.chain(*steps, make(rate, **options))


def make_optimizer(train):
  """The optimizer of a config's `train` section."""
  return optimizer(
    learning_rate(
      peak=train.optimizer.learning_rate,
      warmup=train.optimizer.warmup,
      decay_steps=train.num_steps if train.optimizer.decay else None,
    ),
    kind=train.optimizer.kind,
    clip=train.optimizer.clip,
    **dict(train.optimizer.options),
  )


def ema_decay(step, limit):
  """min(limit, (1 + n)/(10 + n)): an average that forgets its start soon."""
  step = step.astype(jnp.float32)
  return jnp.minimum(limit, (1 + step) / (10 + step))
