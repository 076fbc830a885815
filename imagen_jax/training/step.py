"""One training step: text encoder, loss, gradient, update, EMA."""

import functools

import jax
import jax.numpy as jnp
import optax

from imagen_jax import sharding
from imagen_jax.cascade import objective
from imagen_jax.text.encoder import encode_tokens
from imagen_jax.training.state import TrainState, ema_decay

NUM_BANDS = 4  # of the time t, from clean (0) to noise (1)


def jit_step(mesh, shardings, **options):
  """`train_step` compiled for a mesh; the state's buffers are used again.

  Args:
    mesh: from `sharding.make_mesh`.
    shardings: the state's shardings.
    **options: the keyword arguments of `train_step`.
  """
  return jax.jit(
    functools.partial(train_step, **options),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )


def train_step(
  state,
  batch,
  text_params,
  *,
  stage,
  text_module,
  tx,
  seed,
  ema_limit,
  accumulate=1,
  unroll=None,
):
  """Takes one step; a step with NaN or Inf changes nothing but the counters.

  Args:
    state: the `TrainState`.
    batch: `image` uint8 [B, R, R, 3], `ids` int32 [B, L], `mask` bool [B, L];
      B is the global batch, sharded over the mesh. `text` [B, L, D] in place
      of `ids` are embeddings made beforehand.
    text_params: the frozen text encoder's; unused with `text`.
    stage: the `Stage` that is trained.
    text_module: the text encoder's module.
    tx: the optimizer.
    seed: int; with the step's number it makes the step's key, so a resumed
      run samples what the uninterrupted one would have sampled.
    ema_limit: the EMA's decay after its warm-up.
    accumulate: parts of the batch whose gradients are taken one after the
      other and averaged, for less memory; a divisor of B over the devices.
      Noise is sampled part by part, so other values sample other noise.
    unroll: whether the loop over the parts is unrolled; None: on CPU only,
      where the gradient of a convolution in a loop is slow.

  Returns:
    (state, metrics): metrics are the scalars loss, grad_norm, param_norm and
    skipped, and two [4] vectors: band_loss, the summed loss of the images
    in each quarter of the time t, and band_count, how many those were.
  """
  text = embed(text_module, text_params, batch)

  def loss_fn(params, key, image, text, mask):
    values, details = objective.loss(stage, params, key, image, text, mask)
    return values, details['t']

  return take_step(
    state,
    loss_fn,
    (batch['image'], text, batch['mask']),
    tx=tx,
    seed=seed,
    ema_limit=ema_limit,
    accumulate=accumulate,
    unroll=unroll,
  )


def take_step(
  state, loss_fn, arrays, *, tx, seed, ema_limit, accumulate=1, unroll=None
):
  """`train_step` of any loss.

  Args:
    state: the `TrainState`.
    loss_fn: (params, key, *arrays) -> ([B] losses, [B] times in [0, 1]).
    arrays: of B rows each.
    tx, seed, ema_limit, accumulate, unroll: see `train_step`.

  Returns:
    (state, metrics).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)

  def mean_loss(params, key, *arrays):
    values, t = loss_fn(params, key, *arrays)
    band = (t * NUM_BANDS).astype(int).clip(0, NUM_BANDS - 1)
    here = jax.nn.one_hot(band, NUM_BANDS)
    bands = {'band_loss': values @ here, 'band_count': here.sum(axis=0)}
    return jnp.mean(values), bands

  gradient = jax.value_and_grad(mean_loss, has_aux=True)
  if accumulate == 1:
    (loss, bands), grads = gradient(state.params, key, *arrays)
  else:
    (loss, bands), grads = _accumulated(
      gradient, state.params, key, arrays, accumulate, unroll
    )
  grad_norm = optax.tree.norm(grads)
  good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  decay = ema_decay(state.step, ema_limit)
  # In this form the average of equal numbers is that number, to the bit.
  ema_params = jax.tree.map(
    lambda ema, p: ema + (1 - decay) * (p - ema), state.ema_params, params
  )

  def keep(new, old):
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

  bad = jnp.logical_not(good).astype(jnp.int32)
  state = TrainState(
    step=state.step + 1,
    params=keep(params, state.params),
    ema_params=keep(ema_params, state.ema_params),
    opt_state=keep(opt_state, state.opt_state),
    skipped=state.skipped + bad,
    skipped_in_row=(state.skipped_in_row + 1) * bad,
  )
  metrics = {
    'loss': loss,
    'grad_norm': grad_norm,
    'param_norm': optax.tree.norm(state.params),
    'skipped': state.skipped,
    **bands,
  }
  return state, metrics


def embed(text_module, text_params, batch):
  """The embeddings of a batch's captions, [B, L, D] float32, frozen."""
  if 'text' in batch:
    return batch['text'].astype(jnp.float32)
  return jax.lax.stop_gradient(
    encode_tokens(text_module, text_params, batch['ids'], batch['mask'])
  )


def _accumulated(gradient, params, key, arrays, parts, unroll):
  """The mean of `gradient` over the parts of a batch, one at a time."""
  if unroll is None:
    unroll = jax.default_backend() == 'cpu'

  def split(x):
    # Row r belongs to part r % parts: every device keeps its own rows.
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  def add(total, part):
    i, arrays = part
    arrays = sharding.constrain_batch(arrays)
    new = gradient(params, jax.random.fold_in(key, i), *arrays)
    return jax.tree.map(jnp.add, total, new), None

  band = jnp.zeros((NUM_BANDS,))
  zeros = (
    (jnp.zeros(()), {'band_loss': band, 'band_count': band}),
    jax.tree.map(jnp.zeros_like, params),
  )
  total, _ = jax.lax.scan(
    add,
    zeros,
    (jnp.arange(parts), jax.tree.map(split, arrays)),
    unroll=parts if unroll else 1,
  )
  return jax.tree.map(lambda x: x / parts, total)
