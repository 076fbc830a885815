"""The optimizer and its learning rate, from a config's `train` section."""

import functools
import math
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from imagen_jax.errors import UsageError, check_choice
from imagen_jax.training.muon import muon


def learning_rate(
  *, peak: float, warmup: int, decay_steps: int | None = None
) -> optax.Schedule:
  """Linear warm-up to `peak`, then constant or a cosine to 0 (F.1).

  Args:
    peak: the highest rate (1e-4 in the paper).
    warmup: steps of warm-up (10,000 in the paper); with a decay, at most a
      tenth of `decay_steps`, for short runs.
    decay_steps: the step at which the cosine reaches 0, warm-up included;
      None holds the peak. The paper's listing prints an end value of
      2,500,000, its number of steps, where it must mean 0.

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


def optimizer(
  rate: optax.ScalarOrSchedule,
  *,
  kind: str = 'adam',
  clip: float | None = 1.0,
  **options: Any,
) -> optax.GradientTransformation:
  """Adam, Adafactor or Muon on a clipped gradient (4.1, F.1–F.3).

  Args:
    rate: learning rate, a number or a function of the step.
    kind: 'adam' (super-resolution: "Adafactor hurt model quality"),
      'adafactor' (the base model's, for its memory), or 'muon' (not in the
      paper; a small model learns more per step, Jordan et al. 2024). optax's
      Adafactor multiplies the rate by the parameter's RMS; a zero-initialised
      layer then takes some 10,000 steps at 1e-4 to leave zero, so set
      `multiply_by_parameter_scale=False` in short runs.
    clip: largest global norm of the gradient; None does not clip.
    **options: for `optax.adam`, `optax.adafactor` or `muon.muon`.

  Returns:
    an `optax.GradientTransformation`.

  Raises:
    UsageError: an unknown kind or option.
  """
  kinds = {
    'adam': optax.adam,
    'adafactor': _adafactor,
    'muon': functools.partial(muon, axes=matrix_axes),
  }
  check_choice('train.optimizer.kind', kind, kinds)
  steps = [] if clip is None else [optax.clip_by_global_norm(clip)]
  try:
    return optax.chain(*steps, kinds[kind](rate, **options))
  except (TypeError, ValueError) as error:
    raise UsageError(f'train.optimizer.options: {error}.') from error


def _adafactor(
  rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
  """Adafactor that sees every kernel of an attention as a matrix.

  It factors the second moments of an array's two largest axes, if both are at
  least 128. Of [features, heads, size] they are not, and a sixth of the base
  model's parameters would keep all of their moments.
  """
  inner = optax.adafactor(rate, **options)

  def matrices(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(_as_matrix, tree)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    flat, state = inner.update(matrices(updates), state, matrices(params))
    like = lambda new, old: new.reshape(old.shape)
    return jax.tree.map(like, flat, updates), state

  return optax.GradientTransformation(lambda p: inner.init(matrices(p)), update)


def _as_matrix(path: tuple, leaf: Any) -> Any:
  """A kernel with the heads' axes merged; any other array as it is."""
  axes: Any = matrix_axes(path, leaf)  # ((rows), (columns))
  if axes is None or leaf.ndim != 3 or len(axes[0] + axes[1]) != 3:
    return leaf
  return leaf.reshape([math.prod(leaf.shape[i] for i in part) for part in axes])


def matrix_axes(
  path: tuple, leaf: Any
) -> optax.contrib.MuonDimensionNumbers | None:
  """The axes of a parameter that are a matrix's rows and columns, for Muon.

  Args:
    path: its path in the tree.
    leaf: the parameter, or its shape. Stacked layers have a leading axis.

  Returns:
    `optax.contrib.MuonDimensionNumbers` of input and output axes; None for
    parameters that are not matrices, and the first and last convolution.
  """
  axes = optax.contrib.MuonDimensionNumbers
  names = [entry.key for entry in path]
  if names[-1] != 'kernel' or names[0] in ('conv_in', 'conv_out'):
    return None
  layer = ''.join(names[-2:-1])
  if leaf.ndim == 3 and layer == 'out':  # attention: [heads, size, features]
    return axes((0, 1), (2,))
  if leaf.ndim == 3 and layer != 'film':  # attention: [features, heads, size]
    return axes((0,), (1, 2))
  dense = leaf.ndim in (2, 3)
  inputs = leaf.ndim - 2 if dense else range(leaf.ndim - 4, leaf.ndim - 1)
  return axes((inputs,) if dense else tuple(inputs), (leaf.ndim - 1,))


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
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
