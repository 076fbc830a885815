"""How a network's training is laid out on a CPU, measured when a run begins.

XLA runs a batch as one device with all cores, or as one device a core with a
part of the batch each; and one library or another has the convolutions. Which
is fastest differs between networks and processors. The gradient is rounded
differently, so a run keeps its layout.
"""

import collections
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imagen_jax import compiler, sharding
from imagen_jax.cascade import stage_config
from imagen_jax.cascade.stage import init_params
from imagen_jax.compiler import EIGEN
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import UsageError, check_choice
from imagen_jax.training.flops import convolutions

AUTO, CORES = 'auto', 'cores'
FASTER = 0.95  # of the time of `CORES`; less of a gain is chance
LEAST_STEPS = 1000  # a shorter run would not regain what measuring takes
CONVOLUTIONS, TURNS = 4, 5  # that are measured, the heaviest; turns of each
MOST_FLOPS = 2e10  # of one of them; a larger one is measured with fewer rows
LAYOUT = 'NHWC', 'HWIO', 'NHWC'
PLAIN = jax.lax.conv_dimension_numbers((1,) * 4, (1,) * 4, LAYOUT)
Shape: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Any]


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way to train on a CPU.

  Attributes:
    words: what it is.
    devices: of XLA's that share a batch; −1: all.
    options: of XLA's compiler.
  """

  words: str
  devices: int = -1
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


LAYOUTS = {
  CORES: Layout('one device a core'),
  'cores_eigen': Layout(
    'one device a core, convolutions by Eigen', options=EIGEN
  ),
  'one': Layout('one device of all cores', 1),
  'one_eigen': Layout(
    'one device of all cores, convolutions by Eigen', 1, EIGEN
  ),
}


def settle(
  config: ConfigDict, stored: Mapping[str, Any] | None, *, measure: bool = True
) -> str | None:
  """Replaces `mesh.cpu='auto'` by a layout, and sets `mesh.data` to fit.

  Args:
    config: of the run, changed in place.
    stored: config of the run that is resumed; None: it is new.
    measure: whether a new run may take some seconds to choose.

  Returns:
    a line that says what was measured; None if nothing was.

  Raises:
    UsageError: there is no such layout, or it does not fit `mesh.data`,
      `mesh.fsdp` or several processes.
  """
  if 'cpu' not in config.get('mesh', {}):  # not one of `configs/`
    return None
  mesh, said = config.mesh, None
  check_choice('mesh.cpu', mesh.cpu, (AUTO, *LAYOUTS))
  given, sizes = mesh.cpu, (mesh.data, mesh.fsdp)
  free = sizes == (-1, 1)
  if mesh.cpu == AUTO and stored is not None:
    mesh.cpu = stored.get('mesh', {}).get('cpu', CORES)
  elif mesh.cpu == AUTO and measure and free and _worthwhile(config):
    mesh.cpu, said = _fastest(config)
  elif mesh.cpu == AUTO:
    mesh.cpu = CORES
  if jax.default_backend() != 'cpu' or LAYOUTS[mesh.cpu].devices != 1:
    return said
  if jax.process_count() == 1 and (free or sizes == (1, 1)):
    mesh.data = 1
  elif given == AUTO:  # stored with the run, which now has another mesh
    mesh.cpu = mesh.cpu.replace('one', CORES)
  else:
    raise UsageError(
      f'mesh.cpu={given} is one device of one process, and there are '
      f'{jax.process_count()} processes with mesh.data={mesh.data}, '
      f'mesh.fsdp={mesh.fsdp}; leave out one or the other.',
      key='config.mesh.cpu',
    )
  return said


def compiler_options(config: ConfigDict, mesh: Mesh) -> dict[str, Any] | None:
  """XLA's options for a run's step on the devices of `mesh`."""
  layout = LAYOUTS.get(config.get('mesh', {}).get('cpu'))
  if layout is None or mesh.devices.flat[0].platform != 'cpu':
    return None
  return compiler.known(mesh.devices.flat[0], layout.options)


def _worthwhile(config: ConfigDict) -> bool:
  """Whether a layout may be chosen, and the run is long enough to gain."""
  chosen = 'JAX_NUM_CPU_DEVICES', 'XLA_FLAGS'
  return (
    jax.default_backend() == 'cpu'
    and jax.process_count() == 1
    and config.kind == 'stage'
    and config.train.num_steps >= LEAST_STEPS
    and not any(os.environ.get(name) for name in chosen)
  )


def _fastest(config: ConfigDict) -> tuple[str, str]:
  """The name of the fastest layout, and a line that says so."""
  begin = time.perf_counter()
  shapes = _heaviest(config)
  seconds = {}
  for name, layout in LAYOUTS.items():
    if layout.devices == 1 and len(jax.devices()) == 1:
      continue
    mesh = sharding.make_mesh(layout.devices)
    if config.train.batch_size % mesh.size:
      continue
    try:
      seconds[name] = sum(
        count * _time(shape, layout, mesh) for shape, count in shapes
      )
    except jax.errors.JaxRuntimeError:  # another jax does not know the option
      continue
  best = min(seconds, key=seconds.__getitem__, default=CORES)
  ratio = seconds[best] / seconds[CORES] if seconds.get(CORES) else 1.0
  if ratio > FASTER:
    best = CORES
  took = time.perf_counter() - begin
  words = LAYOUTS[best].words
  gain = f', {ratio:.2f} of the time of {CORES}' if best != CORES else ''
  return best, (
    f'measured for {took:.0f} s: {words}{gain} (--config.mesh.cpu={best})'
  )


def _heaviest(config: ConfigDict) -> list[tuple[Shape, int]]:
  """The shapes of the convolutions with most FLOPs, and how many of each."""
  stage = stage_config.from_config(
    config.stage.to_dict(),
    text_dim=32,
    text_len=8,
    dtype=resolve_dtype(config.dtype),
  )
  traced = jax.make_jaxpr(functools.partial(init_params, stage))
  made = filter(_plain, convolutions(traced(jax.random.key(0))))
  found = collections.Counter(
    ((config.train.batch_size, *image[1:]), *rest)  # it is traced with one row
    for image, *rest in map(_shape, made)
  )
  work = lambda item: item[1] * _flops(item[0])
  return sorted(found.items(), key=work, reverse=True)[:CONVOLUTIONS]


def _flops(shape: Shape) -> float:
  """FLOPs of a convolution, those on its padding included."""
  image, kernel, strides, _ = shape
  return float(2 * np.prod(image[:-1]) * np.prod(kernel) / np.prod(strides))


def _plain(eqn: JaxprEqn) -> bool:
  """Whether it is one of images (NHWC) with HWIO kernels, without groups."""
  params = eqn.params
  return (
    params['dimension_numbers'] == PLAIN
    and params['feature_group_count'] == params['batch_group_count'] == 1
    and {*params['lhs_dilation'], *params['rhs_dilation']} == {1}
  )


def _shape(eqn: JaxprEqn) -> Shape:
  image, kernel = (cast('jax.core.ShapedArray', x.aval) for x in eqn.invars)
  return image.shape, kernel.shape, eqn.params['window_strides'], image.dtype


def _time(shape: Shape, layout: Layout, mesh: Mesh) -> float:
  """Seconds of a convolution and its gradient, a median."""
  (rows, *inside), kernel, strides, dtype = shape
  fewer = int(rows * min(1, MOST_FLOPS / _flops(shape)))
  fewer = fewer // mesh.size * mesh.size
  image = (max(fewer, mesh.size), *inside)
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=strides,
    padding='SAME',
    dimension_numbers=LAYOUT,
  )

  def work(x: jax.Array, w: jax.Array) -> Any:
    y, transpose = jax.vjp(convolve, x, w)
    return transpose(y)

  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  args = (
    jax.device_put(jnp.ones(image, dtype), split),
    jax.device_put(jnp.ones(kernel, dtype), whole),
  )
  jitted = jax.jit(work, out_shardings=(split, whole))
  run = jitted.lower(*args).compile(compiler_options=dict(layout.options))
  jax.block_until_ready(run(*args))
  seconds = []
  for _ in range(TURNS):
    begin = time.perf_counter()
    jax.block_until_ready(run(*args))
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds) * rows / image[0]
