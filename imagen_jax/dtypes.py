"""The dtype of activations, and the settings of jax that change results."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from imagen_jax.errors import UsageError

# Settings of jax that change results, at the values of every run. A user's
# environment may have others, such as JAX_ENABLE_X64 for another project.
NUMERICS = {
  'jax_enable_x64': False,
  'jax_default_prng_impl': 'threefry2x32',
  'jax_threefry_partitionable': True,
  'jax_random_seed_offset': 0,
  'jax_numpy_dtype_promotion': 'standard',
  'jax_numpy_rank_promotion': 'allow',
}


@contextlib.contextmanager
def pinned() -> Iterator[None]:
  """`NUMERICS` in this thread, for a block or a decorated function.

  Raises:
    UsageError: jax cannot set one of them for a block, and it has another
      value.
  """
  with contextlib.ExitStack() as stack:
    for name, value in NUMERICS.items():
      context = getattr(jax, name.removeprefix('jax_'), None)
      if context is not None:
        stack.enter_context(context(value))
      elif getattr(jax.config, name) != value:
        raise UsageError(
          f'{name.upper()} is {getattr(jax.config, name)}; it must be {value}: '
          f"unset it, or call jax.config.update('{name}', {value!r})."
        )
    yield


def resolve_dtype(name: str) -> DTypeLike:
  """The jax dtype of 'float32' ('fp32'), 'bfloat16' ('bf16') or 'auto'.

  'auto' is bfloat16 where the device multiplies it natively (every TPU, NVIDIA
  GPUs from compute capability 8.0) and float32 elsewhere. Parameters are always
  float32.

  Raises:
    UsageError: for any other name.
  """
  if name in ('float32', 'fp32'):
    return jnp.float32
  if name in ('bfloat16', 'bf16'):
    return jnp.bfloat16
  if name != 'auto':
    raise UsageError(
      f'dtype {name!r} is unknown; choose auto, float32 or bfloat16.'
    )
  device = jax.devices()[0]
  if device.platform == 'tpu':
    return jnp.bfloat16
  capability = getattr(device, 'compute_capability', None)
  if device.platform == 'gpu' and capability and float(capability) >= 8:
    return jnp.bfloat16
  return jnp.float32


def matmul_precision(
  dtype: DTypeLike,
) -> contextlib.AbstractContextManager[object]:
  """Where float32 activations are multiplied in float32, in jax's 'highest'.

  By default a TPU multiplies float32 in bfloat16, and an NVIDIA GPU in
  TensorFloat-32. To choose that, set JAX_DEFAULT_MATMUL_PRECISION, which takes
  precedence. For other dtypes nothing changes.
  """
  config: Any = jax.config  # its options have no types
  chosen = config.jax_default_matmul_precision
  if jnp.dtype(dtype) != jnp.float32 or chosen is not None:
    return contextlib.nullcontext()
  return jax.default_matmul_precision('highest')
