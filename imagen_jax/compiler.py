"""Options of XLA's compiler, where its defaults are slow."""

import functools
import os
from collections.abc import Mapping
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
# Of training steps, by platform, so that devices compute while they exchange
# parameters and gradients (docs/tpu.md, docs/gpu.md).
PRESETS: dict[str, dict[str, Any]] = {
  'tpu': {
    # Sums of gradients start as soon as this many bytes are there; by default
    # nearly all are combined, and the last gradient waited for.
    'xla_jf_crs_combiner_threshold_in_bytes': 2**20,
    # These sums are started and awaited, and other operations run meanwhile.
    'xla_enable_async_all_reduce': True,
    'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
  },
  'gpu': {
    # Orders operations so that others run while data are exchanged.
    'xla_gpu_enable_latency_hiding_scheduler': True,
  },
}


def training_options(device: jax.Device) -> dict[str, Any]:
  """The options of `PRESETS` for a device, which need not exist.

  Those that the environment sets are left out, and so are those that are not
  `known`.
  """
  given = ' '.join(
    os.environ.get(x, '') for x in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
  )
  preset = PRESETS.get(device.platform, {})
  wanted = {k: v for k, v in preset.items() if f'--{k}' not in given}
  return known(device, wanted)


def known(device: jax.Device, options: Mapping[str, Any]) -> dict[str, Any]:
  """Those of some options that this jax knows; a line names the others."""
  return dict(_known(device, tuple(options.items())))


@functools.cache
def _known(
  device: jax.Device, options: tuple[tuple[str, Any], ...]
) -> tuple[tuple[str, Any], ...]:
  if _knows(device, dict(options)):
    return options
  found = tuple(one for one in options if _knows(device, dict([one])))
  unknown = ', '.join(name for name, _ in options if name not in dict(found))
  if jax.process_index() == 0:
    print(f'this jax compiles without options it does not know: {unknown}')
  return found


def _knows(device: jax.Device, options: dict[str, Any]) -> bool:
  """Whether the compiler for a device takes some options."""
  if not options:
    return True
  place = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((), 'float32', sharding=place)
  try:
    jax.jit(lambda x: -x).lower(x).compile(compiler_options=options)
  except jax.errors.JaxRuntimeError:
    return False
  return True


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
