"""Dense layers and convolutions whose parameters may be sharded.

Each gathers its own parameters just before it uses them, in its computation
dtype. Otherwise XLA's partitioner propagates the sharding of a kernel to the
activations and then gathers those: for the 64→256 model on 256 chips, a whole
batch of 2,048 images on every chip.
"""

import functools
from typing import Any

import flax.linen as nn
from flax.linen.dtypes import promote_dtype

from imagen_jax import sharding
from imagen_jax.typing import Array


def _promote(
  *args: Array | None, dtype: Any = None, inexact: bool = True
) -> list[Any]:
  """Flax's `promote_dtype` of (input, *parameters), which it also gathers."""
  whole = promote_dtype(*args, dtype=dtype, inexact=inexact)
  for i, param in enumerate(args[1:], start=1):
    if param is not None:
      whole[i] = sharding.gather(param, whole[i].dtype)
  return whole


Dense = functools.partial(nn.Dense, promote_dtype=_promote)
DenseGeneral = functools.partial(nn.DenseGeneral, promote_dtype=_promote)
Conv = functools.partial(nn.Conv, promote_dtype=_promote)
