"""What a run is, printed before its first step."""

import math

import jax
import jax.numpy as jnp

from imagen_jax import stage as stages

MIB = 2**20
# Parameters by the first word of their module's name.
GROUPS = {
  'down': 'way down',
  'mid': 'middle',
  'up': 'way up',
  'conditioning': 'time, level and pooled text',
  'text': 'text projection',
}
REST = 'first and last convolution'


def parameter_table(params):
  """{what: number of parameters}, the largest part first."""
  table = {}
  for name, part in params.items():
    group = GROUPS.get(name.split('_')[0], REST)
    table[group] = table.get(group, 0) + stages.num_params(part)
  return dict(sorted(table.items(), key=lambda item: -item[1]))


def device_bytes(tree, placed):
  """Bytes of a tree that one device holds, given the leaves' shardings."""
  return sum(
    math.prod(where.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
    for leaf, where in zip(jax.tree.leaves(tree), jax.tree.leaves(placed))
  )


def startup(stage, mesh, state, placed, text, *, batch_size, flops=None):
  """The report, as lines.

  Args:
    stage: the stage.
    mesh: the mesh.
    state: the `TrainState`, or its shapes.
    placed: its shardings.
    text: (the text encoder's parameters, their shardings).
    batch_size: of a step, over all devices.
    flops: operations of a step over all devices, or None.
  """
  device = mesh.devices.flat[0]
  data, fsdp = mesh.shape['data'], mesh.shape['fsdp']
  yield f'{stage.name}: {stages.num_params(state.params):,} parameters'
  for group, count in parameter_table(state.params).items():
    yield f'  {group:28} {count:14,}'
  hosts = len({d.process_index for d in mesh.devices.flat})
  yield (
    f'  mesh: data {data} × fsdp {fsdp} = {mesh.size} {device.device_kind} '
    f'device(s) of {hosts} process(es), {batch_size // mesh.size} pictures each'
  )
  parts = {
    'parameters': (state.params, placed.params),
    'EMA': (state.ema_params, placed.ema_params),
    'optimizer': (state.opt_state, placed.opt_state),
    'text encoder': text,
  }
  sizes = {name: device_bytes(*part) / MIB for name, part in parts.items()}
  yield (
    f'  a device holds {sum(sizes.values()):,.1f} MiB: '
    + ', '.join(f'{name} {size:,.1f}' for name, size in sizes.items())
  )
  if flops:
    yield f'  a step takes {flops:.3g} operations, {flops / mesh.size:.3g} each'
