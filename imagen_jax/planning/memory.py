"""Peak memory and traffic of a traced program, estimated before compilation.

The jaxpr is that of the step that will run. The traffic of a loop's body counts
once per iteration; XLA's own cost analysis counts it once.
"""

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from imagen_jax.training.flops import inner_jaxpr, num_elements

# Operations that a compiler fuses into their readers, computing them again
# instead of storing their results.
FUSED = frozenset(
  'add add_any sub mul div neg max min sign abs exp exp2 expm1 log log1p tanh '
  'logistic erf erf_inv sqrt rsqrt cbrt square integer_pow pow sin cos tan '
  'atan2 floor ceil round clamp select_n eq ne lt le gt ge and or xor not '
  'shift_left shift_right_logical convert_element_type bitcast_convert_type '
  'is_finite broadcast_in_dim reshape squeeze expand_dims transpose rev slice '
  'copy copy_p stop_gradient iota pad reduce_precision sharding_constraint '
  'optimization_barrier dynamic_slice nextafter rem split name'.split()
)

# Those without arithmetic, which matrix products and convolutions read through.
# `jax.checkpoint` names values, and marks those that it saves by a
# reduce_precision to their own type.
MOVES = frozenset(
  'broadcast_in_dim reshape squeeze expand_dims transpose rev slice copy '
  'convert_element_type stop_gradient pad sharding_constraint '
  'reduce_precision name'.split()
)
# Those that give the same bytes another shape.
VIEWS = frozenset(
  'reshape squeeze expand_dims stop_gradient sharding_constraint '
  'reduce_precision name'.split()
)
SUMS = {'reduce_sum', 'reduce_max', 'reduce_min'}
PRODUCTS = {'dot_general', 'conv_general_dilated'}


# A jaxpr may be called several times, so a value is (number, variable).
Value: TypeAlias = tuple[int, Any]
SizeOf: TypeAlias = Callable[[Any], float]


class Operation(NamedTuple):
  """An equation of a program whose calls are inlined; literals are left out."""

  eqn: JaxprEqn
  inputs: list[Value]
  outputs: list[Value]

  @property
  def name(self) -> str:
    return self.eqn.primitive.name

  @property
  def fused(self) -> bool:
    return self.name in FUSED


def peak_and_traffic(
  jaxpr: Jaxpr | ClosedJaxpr, size_of: SizeOf | None = None
) -> tuple[float, float]:
  """(peak, traffic): bytes alive at once, and bytes moved, without arguments.

  The model is a compiler that fuses elementwise chains. A fused value takes no
  memory and keeps its sources alive. It is stored instead if its sources are
  larger, or if a matrix product or convolution reads it. Every other value is
  written once, stored until its last use, and read by each operation that is
  not fused. Results, and values that only lead to results, are free: they
  overwrite the arguments.

  Args:
    jaxpr: from `jax.make_jaxpr`.
    size_of: aval -> bytes; None counts every array in full.
  """
  size_of = size_of or num_bytes
  whole = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
  operations = _flat(whole)
  stored, traffic, last = _stored(operations, size_of)
  changes = np.zeros(len(operations) + 1)
  for i, value, size in stored:
    changes[i] += size
    changes[last.get(value, i) + 1] -= size
  inside = np.zeros(len(operations) + 1)
  for i, operation in enumerate(operations):
    if operation.name == 'scan':
      params = operation.eqn.params
      inside[i], moved = peak_and_traffic(params['jaxpr'], size_of)
      traffic += params['length'] * moved
  return float(np.max(np.cumsum(changes) + inside, initial=0)), traffic


def num_bytes(aval: Any) -> float:
  """Bytes of an array; keys and tokens count as 0."""
  try:
    return num_elements(aval) * np.dtype(aval.dtype).itemsize
  except (TypeError, AttributeError):
    return 0


def _flat(jaxpr: Jaxpr) -> list[Operation]:
  """The operations of a program, with its calls inlined."""
  operations, numbers = [], itertools.count()

  def walk(jaxpr: Jaxpr, names: dict[Any, Value | None]) -> list[Value | None]:
    def values(variables: Sequence[Any]) -> list[Value | None]:
      return [None if hasattr(v, 'val') else names.get(v) for v in variables]

    for eqn in jaxpr.eqns:
      inner = inner_jaxpr(eqn)
      inputs = values(eqn.invars)
      if inner is not None and eqn.primitive.name != 'scan':
        own = inputs[-len(inner.invars) :]  # without a conditional's index
        outputs = walk(inner, dict(zip(inner.invars, own)))
        names.update(zip(eqn.outvars, outputs))
      else:
        new = [(next(numbers), out) for out in eqn.outvars]
        names.update(zip(eqn.outvars, new))
        known = [v for v in inputs if v is not None]
        operations.append(Operation(eqn, known, new))
    return values(jaxpr.outvars)

  walk(jaxpr, {})
  return operations


def _stored(
  operations: Sequence[Operation], size_of: SizeOf
) -> tuple[list[tuple[int, Value, float]], float, dict[Value, int]]:
  """The stored values of a program, its traffic, and each value's last use.

  Returns:
    (stored, traffic, last): [(operation, value, bytes)], bytes, and
    {value: the last operation that reads it}, with operations by number.
  """
  tail = _tail(operations)
  readers = collections.defaultdict(list)
  for operation in operations:
    for v in set(operation.inputs):
      readers[v].append(operation)
  names = {v: {reader.name for reader in readers[v]} for v in readers}
  operands = {v for v in names if names[v] & PRODUCTS}
  # A loop slices its arrays, so they are stored, however cheap to compute.
  looped = {v for v in names if 'scan' in names[v]}
  # Reductions compute their terms on the fly.
  later = {v for v in names if names[v] <= SUMS}
  later |= _stored_smaller(operations, readers, size_of)
  computed: set[Value] = set()  # with arithmetic between them and their sources
  # value -> {stored value it is computed from: bytes}
  roots: dict[Value, dict[Value, float]] = {}
  stored, traffic, last = [], 0.0, {}
  for i, operation in enumerate(operations):
    sources: dict[Value, float] = {}
    for v in operation.inputs:
      sources |= roots.get(v, {})
    name, fused = operation.name, operation.fused
    done = not fused
    if name not in MOVES or computed.intersection(operation.inputs):
      computed.update(operation.outputs)
    for out in operation.outputs:
      size = size_of(out[1].aval)
      if out in tail:
        roots[out] = {}
        done = True
      elif (
        fused
        and (out in later or sum(sources.values()) <= 1.25 * size + 2**16)
        and not (sources and out in operands and out in computed)
        and not (out in looped and name not in VIEWS)
      ):
        roots[out] = sources
      else:
        roots[out] = {out: size}
        computed.discard(out)
        stored.append((i, out, size))
        traffic += size
        done = True
    if done:
      last.update(dict.fromkeys(sources, i))
      traffic += sum(sources.values())
  return stored, traffic, last


def _stored_smaller(
  operations: Sequence[Operation],
  readers: Mapping[Value, list[Operation]],
  size_of: SizeOf,
) -> set[Value]:
  """Values whose only reader is fused and smaller, such as a cast to bfloat16.

  They are stored as that, if at all.
  """
  smaller = set()
  least: dict[Value, float] = {}  # bytes along the chain of such readers
  for operation in reversed(operations):
    for v in operation.outputs:
      least[v] = size = size_of(v[1].aval)
      found = readers.get(v, [])
      if len(found) == 1 and found[0].fused:
        least[v] = min(size, least[found[0].outputs[0]])
        if least[v] < size:
          smaller.add(v)
  return smaller


def _tail(operations: Sequence[Operation]) -> set[Value]:
  """Fused values that lead to nothing but the results."""
  read: set[Value] = set()  # values that operations outside the tail read
  tail: set[Value] = set()
  for operation in reversed(operations):
    if operation.fused and read.isdisjoint(operation.outputs):
      tail.update(operation.outputs)
    else:
      read.update(operation.inputs)
  return tail
