"""Peak memory and traffic of a traced program, estimated before compilation.

The jaxpr is that of the step that will run. The traffic of a loop's body counts
once per iteration; XLA's own cost analysis counts it once.
"""

import itertools

import numpy as np

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
  'optimization_barrier dynamic_slice nextafter rem split'.split()
)

# Those without arithmetic, which matrix products and convolutions read through.
MOVES = frozenset(
  'broadcast_in_dim reshape squeeze expand_dims transpose rev slice copy '
  'convert_element_type stop_gradient pad sharding_constraint'.split()
)
# Those that give the same bytes another shape.
VIEWS = frozenset(
  'reshape squeeze expand_dims stop_gradient sharding_constraint'.split()
)
SUMS = {'reduce_sum', 'reduce_max', 'reduce_min'}
PRODUCTS = {'dot_general', 'conv_general_dilated'}


def peak_and_traffic(jaxpr, size_of=None):
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
  operations = _flat(getattr(jaxpr, 'jaxpr', jaxpr))
  stored, traffic, last = _stored(operations, size_of)
  changes = np.zeros(len(operations) + 1)
  for i, value, size in stored:
    changes[i] += size
    changes[last.get(value, i) + 1] -= size
  inside = np.zeros(len(operations) + 1)
  for i, (eqn, _, _) in enumerate(operations):
    if eqn.primitive.name == 'scan':
      inside[i], moved = peak_and_traffic(eqn.params['jaxpr'], size_of)
      traffic += eqn.params['length'] * moved
  return float(np.max(np.cumsum(changes) + inside, initial=0)), traffic


def num_bytes(aval):
  """Bytes of an array; keys and tokens count as 0."""
  try:
    return num_elements(aval) * np.dtype(aval.dtype).itemsize
  except (TypeError, AttributeError):
    return 0


def _flat(jaxpr):
  """[(eqn, inputs, outputs)] of a program, with its calls inlined.

  A jaxpr may be called several times, so a value is (number, variable).
  """
  operations, numbers = [], itertools.count()

  def walk(jaxpr, names):
    def value(v):
      return None if hasattr(v, 'val') else names.get(v)

    for eqn in jaxpr.eqns:
      inner = inner_jaxpr(eqn)
      if inner is not None and eqn.primitive.name != 'scan':
        inside = dict(zip(inner.invars, map(value, eqn.invars)))
        names.update(zip(eqn.outvars, walk(inner, inside)))
      else:
        for out in eqn.outvars:
          names[out] = next(numbers), out
        operations.append(
          (eqn, [value(v) for v in eqn.invars], [names[o] for o in eqn.outvars])
        )
    return [value(v) for v in jaxpr.outvars]

  walk(jaxpr, {})
  return operations


def _stored(operations, size_of):
  """The stored values of a program, its traffic, and each value's last use.

  Returns:
    (stored, traffic, last): [(operation, value, bytes)], bytes, and
    {value: the last operation that reads it}, with operations by number.
  """
  tail = _tail(operations)
  readers = {}
  for eqn, inputs, outputs in operations:
    for v in set(inputs) - {None}:
      readers.setdefault(v, []).append((eqn.primitive.name, outputs[0]))
  names = {v: {name for name, _ in found} for v, found in readers.items()}
  operands = {v for v in names if names[v] & PRODUCTS}
  # A loop slices its arrays, so they are stored, however cheap to compute.
  looped = {v for v in names if 'scan' in names[v]}
  # Reductions compute their terms on the fly. A value whose only reader is
  # fused and smaller is stored as that, if at all, for example in bfloat16.
  later = {v for v in names if names[v] <= SUMS}
  least = {}  # value -> least bytes along its chain of single fused readers
  for _, _, outputs in reversed(operations):
    for v in outputs:
      least[v] = size_of(v[1].aval)
      found = readers.get(v, [])
      if len(found) == 1 and found[0][0] in FUSED:
        least[v] = min(least[v], least[found[0][1]])
        if least[v] < size_of(v[1].aval):
          later.add(v)
  computed = set()  # values with arithmetic between them and their sources
  roots = {}  # value -> {stored value it is computed from: bytes}
  stored, traffic, last = [], 0.0, {}
  for i, (eqn, inputs, outputs) in enumerate(operations):
    sources = {}
    for v in inputs:
      if v is not None:
        sources |= roots.get(v, {})
    fused = eqn.primitive.name in FUSED
    done = not fused
    if eqn.primitive.name not in MOVES or computed.intersection(inputs):
      computed.update(outputs)
    for out in outputs:
      size = size_of(out[1].aval)
      if out in tail:
        roots[out] = {}
        done = True
      elif (
        fused
        and (out in later or sum(sources.values()) <= 1.25 * size + 2**16)
        and not (sources and out in operands and out in computed)
        and not (out in looped and eqn.primitive.name not in VIEWS)
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


def _tail(operations):
  """Fused values that lead to nothing but the results."""
  read = set()  # values that operations outside the tail read
  tail = set()
  for eqn, inputs, outputs in reversed(operations):
    fused = eqn.primitive.name in FUSED
    if fused and all(out not in read for out in outputs):
      tail.update(outputs)
    else:
      read.update(v for v in inputs if v is not None)
  return tail
