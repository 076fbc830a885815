"""Options of XLA's compiler, where its defaults are slow."""

import functools
import os
from typing import Any

import jax

_TYPE = 'LIBRARY_FUSION_TYPE_'
# On a CPU, convolutions by Eigen. By default YNNPACK, a newer library, has them
# too, besides the matrix products and sums that are left to it here.
EIGEN: dict[str, Any] = {
  'xla_cpu_experimental_ynn_fusion_type': f'{_TYPE}INDIVIDUAL_DOT,{_TYPE}REDUCE'
}
# For what runs once and is slow to compile: on a CPU, without LLVM's
# optimizations, in half the time.
QUICK: dict[str, Any] = {'xla_backend_optimization_level': 0}


@functools.cache
def sampling_options() -> dict[str, Any] | None:
  """Those under which images are sampled; None: the defaults.

  On a CPU with `EIGEN` a network of 27 M parameters took 0.76 of the time
  (docs/speed.md).
  """
  if jax.default_backend() != 'cpu' or '_ynn_' in os.environ.get(
    'XLA_FLAGS', ''
  ):
    return None
  try:
    jax.jit(lambda x: -x).lower(0.0).compile(compiler_options=EIGEN)
  except jax.errors.JaxRuntimeError:  # another jax does not know the option
    return None
  return EIGEN
