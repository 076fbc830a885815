"""What training carries from step to step: parameters, EMA, optimizer."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from imagen_jax.errors import UsageError


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
  """Adam, Adafactor or Muon behind a clip of the global norm (4.1, F.1–F.3).

  Args:
    rate: learning rate, a number or a function of the step.
    kind: 'adam' (super-resolution: "Adafactor hurt model quality"),
      'adafactor' (the base model's, for its memory), or 'muon' (not in the
      paper; a small model learns more per step, see `shapes_sr1`). optax's
      Adafactor multiplies the rate by the parameter's RMS; a zero-initialised
      layer then takes some 10,000 steps of 1e-4 to leave zero, so that
      `multiply_by_parameter_scale=False` is advised for short runs.
    clip: largest global norm of the gradient; None does not clip.
    **options: for `optax.adam`, `optax.adafactor` or `optax.contrib.muon`.

  Returns:
    an `optax.GradientTransformation`.

  Raises:
    UsageError: an unknown kind or option.
  """
  kinds = {'adam': optax.adam, 'adafactor': optax.adafactor, 'muon': _muon}
  if kind not in kinds:
    raise UsageError(
      f'train.optimizer.kind is {kind!r}; it can be {", ".join(kinds)}.'
    )
  steps = [] if clip is None else [optax.clip_by_global_norm(clip)]
  try:
    return optax.chain(*steps, kinds[kind](rate, **options))
  except TypeError as error:
    raise UsageError(f'train.optimizer.options: {error}.') from error


def _muon(rate, **options):
  """Muon for the kernels inside the network, Adam for all other parameters.

  Updates are scaled to an RMS of 0.2, about Adam's (Liu et al. 2025), so that
  Adam's learning rates are a fair start.
  """
  return optax.contrib.muon(
    rate,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=lambda params: (
      jax.tree_util.tree_map_with_path(matrix_axes, params)
    ),
    **options,
  )


def matrix_axes(path, leaf):
  """Which axes of a parameter are a matrix's rows and columns, for Muon.

  Args:
    path: its path in the tree.
    leaf: the parameter, or its shape. Stacked layers have a leading axis.

  Returns:
    `optax.contrib.MuonDimensionNumbers` of input and output axes; None for
    what is no matrix, and for the first and the last convolution.
  """
  axes = optax.contrib.MuonDimensionNumbers
  names = [entry.key for entry in path]
  if names[-1] != 'kernel' or names[0] in ('conv_in', 'conv_out'):
    return None
  layer = names[-2]
  if leaf.ndim == 3 and layer == 'out':  # attention: [heads, size, features]
    return axes((0, 1), (2,))
  if leaf.ndim == 3 and layer != 'film':  # attention: [features, heads, size]
    return axes((0,), (1, 2))
  dense = leaf.ndim in (2, 3)
  inputs = leaf.ndim - 2 if dense else range(leaf.ndim - 4, leaf.ndim - 1)
  return axes((inputs,) if dense else tuple(inputs), (leaf.ndim - 1,))


def make_optimizer(train):
  """The optimizer of a config's `train` section."""
  return optimizer(
    learning_rate(
      peak=train.optimizer.learning_rate,
      warmup=train.optimizer.warmup,
      decay_steps=max(train.num_steps, 1) if train.optimizer.decay else None,
    ),
    kind=train.optimizer.kind,
    clip=train.optimizer.clip,
    **dict(train.optimizer.options),
  )


def ema_decay(step, limit):
  """min(limit, (1 + n)/(10 + n)): an average that forgets its start soon."""
  step = step.astype(jnp.float32)
  return jnp.minimum(limit, (1 + step) / (10 + step))
