"""The device mesh and the shardings of all arrays.

One mesh with two axes. A batch is split over both; parameters, EMA and
optimizer state are replicated over 'data' and split over 'fsdp' by one rule
that depends on shapes only, so that networks are independent of devices. A
single device is the 1 x 1 mesh, not a special case.

With `mesh.zero`, gradients, EMA and optimizer state are split over 'data' too,
by the same rule (Rajbhandari et al. 2020, stage 2): each device updates a part,
and the new parameters are gathered.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from imagen_jax.errors import UsageError
from imagen_jax.typing import Array

Devices: TypeAlias = Sequence[jax.Device]
Leaf: TypeAlias = Array | jax.ShapeDtypeStruct
Tree = TypeVar('Tree')

AXES = ('data', 'fsdp')
BATCH = PartitionSpec(AXES)
# Over which the parameters are split; and with `mesh.zero` the rest of the
# state.
# Each then has a part of its own part of the parameters.
SPLIT, ZERO = ('fsdp',), ('fsdp', 'data')
FOR_PARAMS = 0.6  # fraction of a device's memory; activations need the rest


def set_cpu_devices(n: int | None = None) -> None:
  """Splits the CPU into `n` virtual devices, one per usable core by default.

  XLA runs one program per device, so this is what uses all cores of a CPU. Call
  it before jax starts its backends: afterwards, or if the user has chosen a
  number, it has no effect. Devices of other kinds are not affected.
  """
  config: Any = jax.config  # its flags are made at import
  chosen = config.jax_num_cpu_devices > 0 or (
    'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  )
  if chosen:
    return
  try:
    jax.config.update('jax_num_cpu_devices', n or usable_cores())
  except RuntimeError:  # the backends have started
    pass


def usable_cores() -> int:
  """The CPU cores of this process, which containers and `taskset` narrow."""
  affinity = getattr(os, 'sched_getaffinity', None)  # not on macOS
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def make_mesh(
  data: int = -1, fsdp: int = 1, *, devices: Devices | None = None
) -> Mesh:
  """A mesh of `data` x `fsdp` devices; -1 stands for all the rest.

  Args:
    data: copies of the state, each for its own part of the batch.
    fsdp: devices over which one copy of the state is split.
    devices: the devices to use, all of them by default. A single process may
      use fewer than there are; several processes must use all.

  Raises:
    UsageError: the sizes do not fit the devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  asked, have = f'mesh.data={data}, mesh.fsdp={fsdp}', len(devices)
  if min(data, fsdp) < -1 or 0 in (data, fsdp) or data == fsdp == -1:
    raise UsageError(
      f'{asked} is not a mesh; give positive numbers, or -1 for one of them, '
      'which stands for the rest of the devices.'
    )
  if -1 in (data, fsdp):
    other = -data * fsdp
    if have % other:
      raise UsageError(
        f'{asked} does not fit: {other} does not divide the number of devices, '
        f'{have}; choose a divisor of it.'
      )
    data, fsdp = (have // other if n == -1 else n for n in (data, fsdp))
  used = data * fsdp
  if used > have:
    raise UsageError(
      f'{asked} needs {used} devices and there are {have}; use smaller '
      'numbers, or -1 for one of them.'
    )
  if used < have and jax.process_count() > 1:
    raise UsageError(
      f'{asked} leaves {have - used} of {have} devices idle, which is not '
      'possible with several processes; use -1 for one of them.'
    )
  grid = device_grid(devices[:used], data, fsdp)
  # Auto: Linen does not support Explicit axes.
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def device_grid(devices: Devices, data: int, fsdp: int) -> np.ndarray:
  """Arranges devices as [data, fsdp] to match their interconnect.

  The network between slices is slow: only the sums of gradients over `data`
  cross it, never the parameters that `fsdp` splits. Within a slice, one axis of
  the torus may be split between the two, as in 128 × 2 on the 4 × 8 × 8 chips
  of a v4 slice.

  Raises:
    UsageError: the slices do not divide `data`.
  """
  num_slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if num_slices == 1:
    return mesh_utils.create_device_mesh(
      (data, fsdp), devices, allow_split_physical_axes=True
    )
  if data % num_slices:
    raise UsageError(
      f'mesh.data={data}, mesh.fsdp={fsdp} would split parameters across the '
      f'{num_slices} slices; make mesh.data a multiple of {num_slices}.'
    )
  return mesh_utils.create_hybrid_device_mesh(
    (data // num_slices, fsdp),
    (num_slices, 1),
    devices,
    allow_split_physical_axes=True,
  )


def sampling_mesh(
  num_bytes: int, fsdp: int | None = None, *, devices: Devices | None = None
) -> Mesh:
  """The mesh for sampling from a network with `num_bytes` of parameters.

  Every accelerator generates its own images and holds all parameters if they
  fit; otherwise they are split over the fewest devices that hold them. On CPU
  it is one device, whose threads work on the same image.

  Args:
    num_bytes: size of the parameters.
    fsdp: devices over which one copy is split; None is the fewest that hold it.
    devices: the devices to use, all of them by default.
  """
  devices = list(jax.devices() if devices is None else devices)
  if fsdp is None:
    if devices[0].platform == 'cpu':
      return make_mesh(devices=devices[:1])
    stats = devices[0].memory_stats() or {}
    room = FOR_PARAMS * stats.get('bytes_limit', float('inf'))
    fsdp = least_split(num_bytes, room, len(devices))
  return make_mesh(fsdp=fsdp, devices=devices)


def least_split(num_bytes: int, room: float, num_devices: int) -> int:
  """The smallest divisor n of `num_devices` with num_bytes / n <= room.

  `num_devices` if even that does not fit.
  """
  sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  return next((n for n in sizes if num_bytes / n <= room), num_devices)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over every device of the mesh."""
  return NamedSharding(mesh, BATCH)


def grid_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Of an array [data, fsdp, …]: each device has its own element."""
  return NamedSharding(mesh, PartitionSpec(*AXES))


def leaf_sharding(
  leaf: Leaf,
  mesh: Mesh | AbstractMesh,
  *,
  min_size: int = 2**14,
  axes: Sequence[str] = SPLIT,
) -> NamedSharding:
  """The sharding of one leaf of parameters or state, from its shape alone.

  The largest dimension that the fsdp axis divides is split over it. The first
  dimension is used only if no other is divisible: in stacked parameters it is
  the scan's, and a scan over a split axis would fetch every block from another
  device. Ties go to the last dimension, which is contiguous in memory. A leaf
  of fewer than `min_size` elements is replicated: gathering it costs more than
  keeping it. Over a further axis, the parts are split in the same way.

  Args:
    leaf: array or `jax.ShapeDtypeStruct`.
    mesh: from `make_mesh`.
    min_size: leaves, or parts, with fewer elements than this are not split.
    axes: of the mesh, in the order in which the leaf is split over them.
  """
  part = list(np.shape(leaf))
  spec: list[tuple[str, ...]] = [()] * len(part)
  for name in axes:
    n = mesh.shape[name]
    free = [i for i, size in enumerate(part) if size % n == 0 and size > 0]
    if n > 1 and free and np.prod(part, dtype=np.int64) >= min_size:
      i = max(free, key=lambda i: (i > 0, part[i], i))
      part[i] //= n
      spec[i] += (name,)
  while spec and not spec[-1]:
    spec.pop()
  # One axis as its name: a spec of the same meaning is not an equal one.
  names = [names[0] if len(names) == 1 else names or None for names in spec]
  return NamedSharding(mesh, PartitionSpec(*names))


def state_shardings(
  abstract_tree: Any,
  mesh: Mesh,
  *,
  min_size: int = 2**14,
  axes: Sequence[str] = SPLIT,
) -> Any:
  """One sharding per leaf of a training state: `leaf_sharding` of each."""
  place = functools.partial(
    leaf_sharding, mesh=mesh, min_size=min_size, axes=axes
  )
  return jax.tree.map(place, abstract_tree)


def axes_of(spec: PartitionSpec) -> set[str]:
  """The axes of the mesh over which an array with a spec is split."""
  parts = (names if isinstance(names, tuple) else (names,) for names in spec)
  return {name for names in parts for name in names if name}


def with_shardings(abstract_tree: Any, shardings: Any) -> Any:
  """The abstract tree with a sharding on every leaf, for restoring."""
  placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(placed, abstract_tree, shardings)


def spread(abstract_tree: Any, min_bytes: int) -> Any:
  """The tree as several hosts read it: each a part of what all of them hold.

  Copies of an array are split over the devices that hold them, along the axis
  along which Orbax splits them when it saves, so that no host reads another's
  part. `replace` then copies over the network of the devices. With one process
  the tree is unchanged.

  Args:
    abstract_tree: of `jax.ShapeDtypeStruct`s with shardings.
    min_bytes: of a part; smaller arrays are read by every host.
  """
  if jax.process_count() == 1:
    return abstract_tree
  return jax.tree.map(lambda x: _spread(x, min_bytes), abstract_tree)


def _spread(leaf: jax.ShapeDtypeStruct, min_bytes: int) -> jax.ShapeDtypeStruct:
  old, size = leaf.sharding, leaf.size * leaf.dtype.itemsize
  if not isinstance(old, NamedSharding):
    return leaf
  axes = [s if isinstance(s, tuple) else (s,) if s else () for s in old.spec]
  axes += [()] * (leaf.ndim - len(axes))
  used = axes_of(old.spec)
  free = [a for a, n in old.mesh.shape.items() if n > 1 and a not in used]
  copies = int(np.prod([old.mesh.shape[a] for a in free], dtype=np.int64))
  shard = old.shard_shape(leaf.shape)
  whole = [i for i, n in enumerate(shard) if n % copies == 0]
  if copies == 1 or size < min_bytes * copies or not whole:
    return leaf
  axes[whole[0]] = (*axes[whole[0]], *free)
  new = NamedSharding(old.mesh, PartitionSpec(*axes))
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=new)


def replace(tree: Any, abstract_tree: Any) -> Any:
  """The arrays with the shardings of `abstract_tree`."""
  structure: Any
  leaves, structure = jax.tree.flatten(tree)
  wanted = [x.sharding for x in structure.flatten_up_to(abstract_tree)]
  moved = [i for i, s in enumerate(wanted) if leaves[i].sharding != s]
  if moved:
    copy = jax.jit(lambda x: x, out_shardings=[wanted[i] for i in moved])
    for i, array in zip(moved, copy([leaves[i] for i in moved])):
      leaves[i] = array
  return structure.unflatten(leaves)


def check_batch_size(
  batch_size: int, mesh: Mesh | AbstractMesh, accumulate: int = 1
) -> None:
  """Rejects a global batch that cannot be split equally over the mesh.

  Raises:
    UsageError: devices times `accumulate` does not divide `batch_size`.
  """
  if accumulate < 1:
    raise UsageError(
      f'train.accumulate is {accumulate}; it is at least 1.',
      key='config.train.accumulate',
    )
  n = mesh.size * accumulate
  if batch_size < 1 or batch_size % n:
    near = max(n, round(batch_size / n) * n)
    parts = f' in {accumulate} parts each' if accumulate > 1 else ''
    raise UsageError(
      f'train.batch_size={batch_size} cannot be split equally over the '
      f'{mesh.size} devices of the mesh{parts}; use a multiple of {n}, such as '
      f'{near}.',
      key='config.train.batch_size',
    )


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Makes global arrays on the mesh from this process's part of a batch.

  Args:
    batch: tree of host arrays [b, ...]; the global batch is the
      concatenation over processes.
    mesh: from `make_mesh`.
  """
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch,
  )


def put_whole_batch(batch: Any, mesh: Mesh) -> Any:
  """Makes global arrays on the mesh from a batch that every process holds."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]),
    batch,
  )


def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
  """Fetches a global array as a NumPy array, whole on every process.

  With one process the shards are copied straight to the host; no device holds
  the whole array.
  """
  if isinstance(x, np.ndarray):
    return x
  if not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def mesh_of(tree: Any) -> Mesh | None:
  """The mesh of a tree's arrays; None if it has no several devices."""
  for leaf in jax.tree.leaves(tree):
    placed = getattr(leaf, 'sharding', None)
    mesh = placed.mesh if isinstance(placed, NamedSharding) else None
    if isinstance(mesh, Mesh) and mesh.size > 1:
      return mesh
  return None
