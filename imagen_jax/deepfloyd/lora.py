"""Low-rank adapters for IF's attentions (Hu et al. 2021).

A frozen kernel W of an attention becomes W + (scale / rank) A B, with A random
and B zero at the start. The sum is formed before the network runs, so the
network knows nothing of it, and an adapted model is exported like any other.
"""

import jax
import jax.numpy as jnp

from imagen_jax.deepfloyd.weights import leaves

TARGETS = ('to_q', 'to_k', 'to_v', 'add_k_proj', 'add_v_proj', 'to_out_0')


def init(key, params, rank):
  """{'path/of/kernel': {'a': [in, r], 'b': [r, out]}}, float32.

  Args:
    key: of A.
    params: the network's, arrays or their shapes.
    rank: r.
  """
  adapters = {}
  for i, (path, leaf) in enumerate(leaves(params)):
    if path[-1] == 'kernel' and path[-2] in TARGETS:
      rows, columns = leaf.shape
      a = jax.random.normal(jax.random.fold_in(key, i), (rows, rank))
      adapters['/'.join(path)] = {
        'a': a / jnp.sqrt(rows),
        'b': jnp.zeros((rank, columns)),
      }
  return adapters


def merge(params, adapters, scale=1.0):
  """The network's parameters with the adapters in them, each in its type."""

  def add(path, leaf):
    adapter = adapters.get('/'.join(key.key for key in path))
    if adapter is None:
      return leaf
    rank = adapter['a'].shape[1]
    change = scale / rank * (adapter['a'] @ adapter['b'])
    return (leaf + change).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(add, params)
