"""Low-rank adapters (LoRA) for IF's attention layers (Hu et al. 2021).

A frozen attention kernel W becomes W + (scale / rank) A B, with A random and B
zero at initialisation. The sum is formed before the network is applied, so the
network is unchanged and an adapted model is exported like any other.
"""

import jax
import jax.numpy as jnp

from imagen_jax.deepfloyd.weights import leaves
from imagen_jax.typing import Values

TARGETS = ('to_q', 'to_k', 'to_v', 'add_k_proj', 'add_v_proj', 'to_out_0')


def init(key: jax.Array, params: dict, rank: int) -> dict:
  """Initialises {'path/of/kernel': {'a': [in, r], 'b': [r, out]}}, float32.

  Args:
    key: of A.
    params: of the network, arrays or shapes.
    rank: r.
  """
  adapters = {}
  for i, (path, leaf) in enumerate(leaves(params).items()):
    if path[-1] == 'kernel' and path[-2] in TARGETS:
      rows, columns = leaf.shape
      a = jax.random.normal(jax.random.fold_in(key, i), (rows, rank))
      adapters['/'.join(path)] = {
        'a': a / jnp.sqrt(rows),
        'b': jnp.zeros((rank, columns)),
      }
  return adapters


def merge(params: dict, adapters: dict, scale: float = 1.0) -> dict:
  """The network's parameters with the adapters added, each in its dtype."""

  def add(path: tuple, leaf: Values) -> Values:
    adapter = adapters.get('/'.join(key.key for key in path))
    if adapter is None:
      return leaf
    rank = adapter['a'].shape[1]
    change = scale / rank * (adapter['a'] @ adapter['b'])
    return (leaf + change).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(add, params)
