"""Dense layers and convolutions whose parameters may be split over devices.

Each gathers its own parameters just before it uses them, in the type it
computes in. Left to choose, XLA's partitioner lets the split of a kernel spread
to the activations, and then moves those: for the 64→256 model on 256 chips it
gathered a whole batch of 2,048 images on every chip.
"""

import functools

import flax.linen as nn
from flax.linen.dtypes import promote_dtype

from imagen_jax import sharding


def _promote(x, *params, **options):
  """Flax's `promote_dtype` of a layer's input and parameters, these whole."""
  x, *promoted = promote_dtype(x, *params, **options)
  return x, *[
    new if old is None else sharding.gather(old, new.dtype)
    for old, new in zip(params, promoted)
  ]


Dense = functools.partial(nn.Dense, promote_dtype=_promote)
DenseGeneral = functools.partial(nn.DenseGeneral, promote_dtype=_promote)
Conv = functools.partial(nn.Conv, promote_dtype=_promote)
