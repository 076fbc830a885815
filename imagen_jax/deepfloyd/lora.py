"""Low-rank adapters (LoRA) for IF's attention layers (Hu et al. 2021).

A frozen attention kernel W becomes W + (scale / rank) A B, with A random and B
zero at initialisation. In training the layers compute x W + (x A) B: a sum of
W and a small A B would be rounded to W in bfloat16. Exported models hold the
sum, in float32.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from imagen_jax.deepfloyd.weights import leaves

TARGETS = ('to_q', 'to_k', 'to_v', 'add_k_proj', 'add_v_proj', 'to_out_0')


def init(key: jax.Array, params: dict, rank: int) -> dict:
  """Initialises {'path.of.kernel': {'a': [in, r], 'b': [r, out]}}, float32.

  A checkpoint's leaves are named with slashes, so these paths have none.

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
      adapters['.'.join(path)] = {
        'a': a / jnp.sqrt(rows),
        'b': jnp.zeros((rank, columns)),
      }
  return adapters


def insert(params: dict, adapters: dict, scale: float = 1.0) -> dict:
  """The network's parameters with A and B beside each adapted kernel.

  `nets.dense.Dense` applies them.
  """
  flat = flatten_dict(params, sep='.')
  for path, adapter in adapters.items():
    a, b = adapter['a'], adapter['b']
    layer = path.removesuffix('kernel')
    flat |= {f'{layer}a': a, f'{layer}b': scale / a.shape[1] * b}
  return unflatten_dict(flat, sep='.')


def merge(params: dict, adapters: dict, scale: float = 1.0) -> dict:
  """The network's parameters, adapted kernels as float32 sums.

  NumPy arrays stay on the host.
  """
  flat = flatten_dict(params, sep='.')
  for path, adapter in adapters.items():
    a, b = adapter['a'], adapter['b']
    change = scale / a.shape[1] * (a @ b)
    flat[path] = flat[path].astype(jnp.float32) + change
  return unflatten_dict(flat, sep='.')
