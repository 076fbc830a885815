"""One training step: conditioning, loss, gradient, update, EMA."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from imagen_jax import collectives
from imagen_jax.training import power_ema
from imagen_jax.training.optimizer import matrix_axes
from imagen_jax.training.state import TrainState, ema_decay
from imagen_jax.typing import Array

NUM_BANDS = 4  # of the time t, from clean (0) to noise (1)

Tree = Any  # a pytree of arrays
Bands = dict[str, Float[Array, ' bands']]
LossFn = Callable[[Tree, jax.Array, Tree, Tree], tuple[Array, dict]]
StepFn = Callable[[TrainState, Tree, Tree], tuple[TrainState, dict]]


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  ema_limit: float,
  condition: Callable[..., Tree] = lambda key, batch, frozen: batch,
  accumulate: int = 1,
  unroll: bool | None = None,
  zero: bool = False,
) -> StepFn:
  """The function (state, batch, frozen) -> (state, metrics) of one step.

  A step whose loss or gradient is not finite changes nothing but the counters
  and the state's `emas`, in which the unchanged parameters count once more.

  Args:
    loss_fn: (params, key, batch, frozen) -> ([B] losses, details). `details`
      may hold `t`, [B] times in [0, 1], and then the metrics have the loss by
      quarters of t.
    tx: the optimizer.
    seed: gives, with the step's number, the step's key, so that a resumed run
      uses the same noise as an uninterrupted one.
    ema_limit: the EMA's decay after its warm-up.
    condition: (key, batch, frozen) -> batch, computed once a step without a
      gradient, such as embedding the captions. An entry `measured` of the
      batch is a dict of further metrics, and not given to `loss_fn`.
    accumulate: number of parts of the batch, whose gradients are computed in
      turn and averaged, to save memory; a divisor of B / number of devices.
      Each part has its own key, so the noise depends on this number.
    unroll: whether the loop over the parts is unrolled; None means on CPU
      only, where the gradient of a convolution in a loop is slow.
    zero: whether each device updates a part of the parameters, see
      `collectives.zero`.

  Returns:
    the function. Its batch is a dict of arrays of B rows, the global batch,
    sharded over the mesh; `frozen` is read by the loss and not trained. Its
    metrics are the scalars loss, grad_norm, param_norm and skipped, and two
    [4] vectors: band_loss, the summed loss in each quarter of t, and
    band_count, the number of examples there (both divided by `accumulate`).
  """
  gradient = _gradient(loss_fn)

  @collectives.zero(zero)
  def train_step(
    state: TrainState, batch: Tree, frozen: Tree
  ) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    batch, measured = condition(condition_key(key), batch, frozen), {}
    if isinstance(batch, dict):
      batch = {**batch}
      measured = batch.pop('measured', {})
    if accumulate == 1:
      (loss, bands), grads = gradient(state.params, key, batch, frozen)
    else:
      part = functools.partial(gradient, frozen=frozen)
      (loss, bands), grads = _accumulated(
        part, state.params, key, batch, accumulate, unroll
      )
    state, metrics = _update(state, tx, loss, grads, bands, ema_limit)
    return state, metrics | measured

  return train_step


def condition_key(key: jax.Array) -> jax.Array:
  """The key of a step's conditioning; no loss folds this number into its."""
  return jax.random.fold_in(key, np.uint32(2**32 - 1))


def half_gradients(loss_fn: LossFn) -> LossFn:
  """The same loss, with the gradients of kernels in bfloat16.

  They are then summed over the devices in it: half the traffic, and rounded at
  every addition. Only kernels inside the network are affected.
  """

  def half(path: tuple, leaf: jax.Array) -> jax.Array:
    return (
      leaf if matrix_axes(path, leaf) is None else leaf.astype(jnp.bfloat16)
    )

  def loss(
    params: Tree, key: jax.Array, batch: Tree, frozen: Tree
  ) -> tuple[Array, dict]:
    params = jax.tree_util.tree_map_with_path(half, params)
    return loss_fn(params, key, batch, frozen)

  return loss


def _gradient(loss_fn: LossFn) -> Callable:
  """(params, key, batch, frozen) -> ((mean loss, bands), gradient)."""

  def mean_loss(
    params: Tree, key: jax.Array, batch: Tree, frozen: Tree
  ) -> tuple[jax.Array, Bands]:
    values, details = loss_fn(params, key, batch, frozen)
    return jnp.mean(values), _bands(values, details)

  return jax.value_and_grad(mean_loss, has_aux=True)


def _bands(values: Float[Array, ' b'], details: dict) -> Bands:
  """Summed losses and counts by quarters of t; zeros without a t."""
  if 't' not in details:
    return _no_bands()
  band = (details['t'] * NUM_BANDS).astype(int).clip(0, NUM_BANDS - 1)
  here = jax.nn.one_hot(band, NUM_BANDS)
  return {'band_loss': values @ here, 'band_count': here.sum(axis=0)}


def _no_bands() -> Bands:
  return dict.fromkeys(('band_loss', 'band_count'), jnp.zeros((NUM_BANDS,)))


def _update(
  state: TrainState,
  tx: optax.GradientTransformation,
  loss: jax.Array,
  grads: Tree,
  bands: Bands,
  ema_limit: float,
) -> tuple[TrainState, dict]:
  """(state, metrics) after a step; skips the update if it is not finite."""
  grads, old = collectives.scatter((grads, state.params))
  grad_norm = optax.tree.norm(grads)
  good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  decay = ema_decay(state.step, ema_limit)

  def change(grads: Tree, trained: tuple[Tree, Tree, Tree]) -> tuple:
    params, ema_params, opt_state = trained
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    # In this form the EMA of equal numbers is that number, to the bit.
    ema_params = jax.tree.map(
      lambda ema, p: ema + (1 - decay) * (p - ema), ema_params, params
    )
    return params, ema_params, opt_state

  # XLA loads the parts of a program faster than a whole (docs/speed.md).
  params, ema_params, opt_state = jax.lax.cond(
    good,
    change,
    lambda grads, trained: trained,
    grads,
    (old, state.ema_params, state.opt_state),
  )
  bad = jnp.logical_not(good).astype(jnp.int32)
  params = collectives.scatter(params)
  state = TrainState(
    step=state.step + 1,
    params=params,
    ema_params=ema_params,
    emas=power_ema.update(state.emas, params, state.step + 1),
    opt_state=opt_state,
    skipped=state.skipped + bad,
    skipped_in_row=(state.skipped_in_row + 1) * bad,
  )
  metrics = {
    'loss': loss,
    'grad_norm': grad_norm,
    'param_norm': optax.tree.norm(params),
    'skipped': state.skipped,
    **bands,
  }
  return state, metrics


def _accumulated(
  gradient: Callable[[Tree, jax.Array, Tree], Tree],
  params: Tree,
  key: jax.Array,
  batch: Tree,
  parts: int,
  unroll: bool | None,
) -> Tree:
  """The mean of `gradient(params, key, part)` over the parts of a batch."""
  if unroll is None:
    unroll = jax.default_backend() == 'cpu'

  def split(x: jax.Array) -> jax.Array:
    # Row r belongs to part r % parts: every device keeps its own rows.
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  def add(total: Tree, numbered: Tree) -> tuple[Tree, None]:
    i, part = numbered
    part = collectives.constrain_batch(part)
    new = gradient(params, jax.random.fold_in(key, i), part)
    (values, grads) = jax.tree.map(jnp.add, total, new)
    return (values, collectives.scatter(grads)), None

  no_grads = collectives.scatter(jax.tree.map(jnp.zeros_like, params))
  zeros = (jnp.zeros(()), _no_bands()), no_grads
  total, _ = jax.lax.scan(
    add,
    zeros,
    (jnp.arange(parts), jax.tree.map(split, batch)),
    unroll=parts if unroll else 1,
  )
  return jax.tree.map(lambda x: x / parts, total)
