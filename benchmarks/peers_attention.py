"""One layer's attention, and its gradients."""

import peers_nets as nets

BATCH, HEADS, SIZE = 4, 4, 32


def _ours(queries, keys, backward=False):
  import jax

  from imagen_jax.nets.dot_product import attention

  q, k, v = (
    jax.device_put(nets.numbers(BATCH, n, HEADS, SIZE))
    for n in (queries, keys, keys)
  )

  def both(*arrays):
    out, back = jax.vjp(attention, *arrays)
    return out, back(out)

  call = jax.jit(both if backward else attention)
  return lambda: jax.block_until_ready(call(q, k, v))


def _torch(queries, keys, backward=False):
  import torch

  q, k, v = (
    torch.from_numpy(nets.numbers(BATCH, HEADS, n, SIZE))
    for n in (queries, keys, keys)
  )

  def work():
    arrays = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*arrays)
    if backward:
      out.backward(out.detach())

  return work


contenders = {'imagen_jax': _ours, 'torch': _torch}
