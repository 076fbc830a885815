"""One training step: text encoder, loss, gradient, update, EMA."""

import jax
import jax.numpy as jnp
import optax

from imagen_jax import stage as stages
from imagen_jax.text.encoder import encode_tokens
from imagen_jax.training.state import TrainState, ema_decay


def train_step(
  state, batch, text_params, *, stage, text_module, tx, seed, ema_limit
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
      run draws what the uninterrupted one would have drawn.
    ema_limit: the EMA's decay after its warm-up.

  Returns:
    (state, metrics): metrics are scalars: loss, grad_norm, skipped.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  if 'text' in batch:
    text = batch['text'].astype(jnp.float32)
  else:
    text = encode_tokens(text_module, text_params, batch['ids'], batch['mask'])
  text = jax.lax.stop_gradient(text)

  def loss_fn(params):
    losses = stages.loss(
      stage, params, key, batch['image'], text, batch['mask']
    )
    return jnp.mean(losses)

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  grad_norm = optax.tree.norm(grads)
  good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  decay = ema_decay(state.step, ema_limit)
  ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)

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
  metrics = {'loss': loss, 'grad_norm': grad_norm, 'skipped': state.skipped}
  return state, metrics
