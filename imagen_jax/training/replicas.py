"""Finds a device that computes or stores wrongly.

The replicas of an array are updated by the same program from the same sums of
gradients, so they are equal to the bit. One that is not shows a device whose
memory or arithmetic is broken. An error in a device's own part of a gradient is
summed into all replicas alike and is not found. With `mesh.zero` the EMA and
the optimizer's state have no replicas, and those of a parameter come from one
device: what is found then is an error in gathering or storing parameters.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, UInt32

from imagen_jax import sharding
from imagen_jax.errors import NumericError
from imagen_jax.typing import Array


def check(state: Any, mesh: Mesh, step: int) -> None:
  """Compares the replicas of a state; every process calls it.

  Args:
    state: tree of arrays of types of at most four bytes.
    mesh: that they are on.
    step: its number, for the message.

  Raises:
    NumericError: some differ; the message names the devices and their hosts.
  """
  if mesh.size == 1:
    return
  wrong = find_wrong(sharding.fetch(checksums(state, mesh)))
  devices = [
    f'{device} of process {device.process_index}'
    for device in mesh.devices[wrong]
  ]
  if devices:
    several = len(devices) > 1
    raise NumericError(
      f'the replicas of the state differ after step {step}: '
      f'{"one of " * several}{", ".join(devices)} computes or stores wrongly; '
      'exclude its host, then run the same command again, which resumes from '
      'the last checkpoint.'
    )


def checksums(state: Any, mesh: Mesh) -> UInt32[Array, 'data fsdp 2']:
  """Each device's sums of the bits of the whole and of the split arrays.

  Any one flipped bit changes them. One small program for each shape of an
  array: a program for all of them takes minutes to compile.
  """
  sums = jnp.zeros((*mesh.devices.shape, 2), jnp.uint32)
  sums = jax.device_put(sums, sharding.grid_sharding(mesh))
  for leaf in jax.tree.leaves(state):
    if 'data' in sharding.axes_of(
      leaf.sharding.spec
    ):  # it has no replicas along it
      continue
    sums = _add(sums, leaf, mesh, leaf.sharding.spec)
  return sums


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def _add(
  sums: jax.Array, leaf: jax.Array, mesh: Mesh, spec: PartitionSpec
) -> jax.Array:
  """Adds the bits that each device holds of an array to its sums."""
  kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
  which = 'fsdp' in spec

  def add(sums: jax.Array, x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize])
    return sums.at[0, 0, int(which)].add(jnp.sum(bits, dtype=jnp.uint32))

  grid = PartitionSpec(*sharding.AXES)
  return jax.shard_map(
    add, mesh=mesh, in_specs=(grid, spec), out_specs=grid, check_vma=False
  )(sums, leaf)


def find_wrong(
  sums: UInt32[np.ndarray, 'data fsdp 2'],
) -> Bool[np.ndarray, 'data fsdp']:
  """The devices that may be wrong: those outvoted, or all of a tie."""
  wrong = np.zeros(sums.shape[:2], bool)
  # Whole arrays are the same on all devices, split ones along 'data'.
  groups = [(sums[..., 0], wrong)]
  groups += [(sums[:, i, 1], wrong[:, i]) for i in range(sums.shape[1])]
  for found, marks in groups:
    values, counts = np.unique(found, return_counts=True)
    most = values[counts == counts.max()]
    if len(values) > 1:
      marks |= (found != most[0]) if len(most) == 1 else True
  return wrong
