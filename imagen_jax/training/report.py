"""The startup report: parameters, mesh, memory and FLOPs of a run."""

import collections
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax.cascade import stage as stages
from imagen_jax.training.program import Program, sets_zero
from imagen_jax.training.state import TrainState

MIB = 2**20
# Parts of the network, by the first word of the module's name.
GROUPS = {
  'down': 'encoder',
  'mid': 'middle',
  'up': 'decoder',
  'conditioning': 'time, level and pooled text',
  'text': 'text projection',
}
REST = 'first and last convolution'


def parameter_table(params: dict) -> dict[str, int]:
  """{part of the network: number of parameters}, the largest first."""
  table: dict[str, int] = collections.Counter()
  for name, part in params.items():
    table[GROUPS.get(name.split('_')[0], REST)] += stages.num_params(part)
  return dict(sorted(table.items(), key=lambda item: -item[1]))


def device_bytes(tree: Any, shardings: Any) -> int:
  """Bytes of a tree that one device holds, given the leaves' shardings."""
  return sum(
    math.prod(where.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
    for leaf, where in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings))
  )


def splits(
  state: TrainState, shardings: TrainState, devices: int
) -> Iterator[str]:
  """Which arrays of the state are sharded and which replicated, as lines.

  Args:
    state: the `TrainState`, or its shapes.
    shardings: its shardings.
    devices: largest number over which one copy is sharded.
  """
  leaves = jax.tree_util.tree_leaves_with_path(state)
  sharded: list[tuple[int, int]] = []
  whole: dict[str, list[int]] = collections.defaultdict(list)
  for (path, leaf), where in zip(leaves, jax.tree.leaves(shardings)):
    size = leaf.size * jnp.dtype(leaf.dtype).itemsize
    held = device_bytes(leaf, where)
    if held < size:
      sharded.append((held, size))
    else:
      name = '/'.join(str(getattr(key, 'key', '')) for key in path[-2:])
      whole[name].append(size)
  part, total = np.reshape(sharded, (-1, 2)).sum(axis=0) / MIB
  yield (
    f'  {len(sharded)} arrays of the state are sharded over {devices} devices: '
    f'{part:,.2f} of {total:,.2f} MiB on each'
  )
  count, rest = (sum(map(f, whole.values())) for f in (len, sum))
  yield f'  {count} small arrays are replicated whole, {rest / MIB:,.2f} MiB:'
  for name, sizes in sorted(whole.items(), key=lambda item: -sum(item[1])):
    yield f'    {len(sizes):5} × {name:30} {sum(sizes) / MIB:10,.3f} MiB'


def startup(program: Program, *, arrays: bool = False) -> Iterator[str]:
  """The report, as lines.

  Args:
    program: of the run.
    arrays: add which arrays are sharded and which are replicated.
  """
  experiment, mesh = program.experiment, program.mesh
  state, shardings = program.state, program.shardings
  device = mesh.devices.flat[0]
  data, fsdp = mesh.shape['data'], mesh.shape['fsdp']
  yield f'{experiment.name}: {stages.num_params(state.params):,} parameters'
  for group, count in parameter_table(state.params).items():
    yield f'  {group:28} {count:14,}'
  hosts = len({d.process_index for d in mesh.devices.flat})
  batch_size = experiment.config.train.batch_size
  yield (
    f'  mesh: data {data} × fsdp {fsdp} = {mesh.size} {device.device_kind} '
    f'device(s) of {hosts} process(es), {batch_size // mesh.size} images each'
  )
  frozen = experiment.frozen_spec()
  parts = {
    'parameters': (state.params, shardings.params),
    'EMA': (
      (state.ema_params, state.emas),
      (shardings.ema_params, shardings.emas),
    ),
    'optimizer': (state.opt_state, shardings.opt_state),
    experiment.frozen_name: (frozen, sharding.state_shardings(frozen, mesh)),
  }
  sizes = {name: device_bytes(*part) / MIB for name, part in parts.items()}
  yield (
    f'  a device holds {sum(sizes.values()):,.1f} MiB: '
    + ', '.join(f'{name} {size:,.1f}' for name, size in sizes.items())
  )
  flops = program.flops
  again = flops - program.model_flops
  most = 'at most ' if any(program.spared_flops) else ''
  yield (
    f'  a step takes {most}{flops:.3g} FLOPs, {flops / mesh.size:.3g} each'
    + (f'; rematerialization repeats {again:.3g} of them' if again else '')
  )
  split = mesh.size if sets_zero(experiment.config) else fsdp
  if arrays and split > 1:
    yield from splits(state, shardings, split)
