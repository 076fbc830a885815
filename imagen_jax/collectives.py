"""What devices exchange in a step: parameters, gradients, rows of a batch.

For use inside jitted code under `jax.set_mesh`. XLA's partitioner places the
communication; these functions say where an array is whole and where it is split
by the rules of `sharding`. Without a mesh they do nothing.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from imagen_jax import sharding
from imagen_jax.typing import Array

Tree = TypeVar('Tree')

_zero = contextvars.ContextVar('zero', default=False)


def gather(
  param: Array,
  dtype: DTypeLike | None = None,
  *,
  stacked: bool = False,
  summed: bool = False,
) -> Array:
  """Gathers a parameter that is split over 'fsdp'.

  For use inside jitted code under `jax.set_mesh`, where the parameter is used,
  so that only one layer at a time is gathered, in the forward and the backward
  pass. Without a split it only casts.

  Args:
    param: array.
    dtype: type in which it is gathered and used; None for its own.
    stacked: it is one layer's of a stack, which is split as a whole; with other
      axes split, a layer would be sent between the devices first.
    summed: its gradient comes from `sum_gradient`, under `zero`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  cast = param if dtype is None else param.astype(dtype)
  if mesh.empty:
    return cast
  stack = jax.ShapeDtypeStruct((1, *param.shape), param.dtype)
  leaf = stack if stacked else param
  specs = (
    sharding.leaf_sharding(leaf, mesh, axes=axes).spec
    for axes in (sharding.SPLIT, _axes())
  )
  spec, wanted = (PartitionSpec(*spec[int(stacked) :]) for spec in specs)
  if mesh.shape['fsdp'] == 1 and wanted == spec:
    return cast
  return _gather(cast, spec, wanted, summed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(
  param: Array, spec: PartitionSpec, wanted: PartitionSpec, summed: bool
) -> jax.Array:
  """A parameter with a spec, whole; its gradient has the spec `wanted`."""
  # Else XLA gathers the wider type and casts afterwards.
  param = jax.lax.with_sharding_constraint(param, spec)
  return jax.lax.with_sharding_constraint(param, PartitionSpec())


def _gather_forward(
  param: Array, spec: PartitionSpec, wanted: PartitionSpec, summed: bool
) -> tuple[jax.Array, None]:
  return _gather(param, spec, wanted, summed), None


def _gather_backward(
  spec: PartitionSpec,
  wanted: PartitionSpec,
  summed: bool,
  _: None,
  gradient: jax.Array,
) -> tuple[jax.Array]:
  """Sums the gradient over the devices; each keeps its shard.

  Without the barrier XLA fuses the slicing into the optimizer, and all
  gradients stay whole until then.
  """
  if not summed:
    gradient = jax.lax.with_sharding_constraint(gradient, PartitionSpec())
  gradient = jax.lax.with_sharding_constraint(gradient, wanted)
  return (jax.lax.optimization_barrier(gradient),)


_gather.defvjp(_gather_forward, _gather_backward)


@contextlib.contextmanager
def zero(on: bool = True) -> Iterator[None]:
  """While a step is traced: gradients are split over 'data' too, if `on`."""
  before = _zero.set(on)
  try:
    yield
  finally:
    _zero.reset(before)


def has_zero() -> bool:
  """Whether the step that is traced is under `zero`."""
  return _zero.get()


def _axes() -> tuple[str, ...]:
  return sharding.ZERO if has_zero() else sharding.SPLIT


def scatter(tree: Tree) -> Tree:
  """Under `zero`, splits every array like the optimizer's state.

  For use inside jitted code under `jax.set_mesh`; otherwise the identity.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not has_zero():
    return tree
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(
      x, sharding.leaf_sharding(x, mesh, axes=sharding.ZERO).spec
    ),
    tree,
  )


def gradient_spec(param: Array) -> PartitionSpec:
  """How the sum of a parameter's gradient is split: under `zero` only."""
  mesh = jax.sharding.get_abstract_mesh()
  if not has_zero():
    return PartitionSpec()
  return sharding.leaf_sharding(param, mesh, axes=sharding.ZERO).spec


def sum_gradient(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """The sum of `x` over all devices, of which each gets its part.

  For use inside `jax.shard_map`, where `spec` is that of the output.
  """
  rest = list(sharding.AXES)
  for dimension, names in enumerate(spec):
    for name in (names,) if isinstance(names, str) else names or ():
      x = jax.lax.psum_scatter(x, name, scatter_dimension=dimension, tiled=True)
      rest.remove(name)
  return jax.lax.psum(x, tuple(rest)) if rest else x


def per_device(
  function: Callable[..., Any], in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
  """The function as each device calls it, with its own rows of a batch.

  For use inside jitted code under `jax.set_mesh`, with a batch that the devices
  divide: nothing is sent between them. Without a mesh, or on one device, it is
  `function`.

  Args:
    function: arrays -> tree of arrays.
    in_axes, out_axes: the batch axis of each argument and result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function
  rows = lambda axis: PartitionSpec(*[None] * axis, *sharding.BATCH)
  in_specs, out_specs = jax.tree.map(rows, (in_axes, out_axes))
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def whole(x: Array) -> Array:
  """An array of which each device has a part, gathered on all of them.

  For use inside jitted code under `jax.set_mesh`; otherwise the identity.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def constrain_batch(x: Tree) -> Tree:
  """Keeps the leading axis of every array in `x` split over the mesh.

  For use inside jitted code under `jax.set_mesh`. Without a mesh it is the
  identity.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.tree.map(
    lambda a: jax.lax.with_sharding_constraint(a, sharding.BATCH), x
  )


def platform() -> tuple[str, int]:
  """('cpu', 'gpu' or 'tpu', number of devices) of the mesh that is set.

  Without a mesh it is the default platform, and one device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.default_backend(), 1
  device = mesh.abstract_device
  return device.platform if device else jax.default_backend(), mesh.size
