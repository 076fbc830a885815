"""Operations and memory of a traced program, read off before any compiler.

Both walk the jaxpr of the very step that will run. Loops are multiplied by
their length, which XLA's own count is not: it counts the body once.
"""

import itertools

import numpy as np

from imagen_jax.training.flops import inner_jaxpr, num_elements

# What a compiler computes anew where it is needed rather than store: it reads
# its operands and is fused into whatever reads it.
FUSED = frozenset(
  'add add_any sub mul div neg max min sign abs exp exp2 expm1 log log1p tanh '
  'logistic erf erf_inv sqrt rsqrt cbrt square integer_pow pow sin cos tan '
  'atan2 floor ceil round clamp select_n eq ne lt le gt ge and or xor not '
  'shift_left shift_right_logical convert_element_type bitcast_convert_type '
  'is_finite broadcast_in_dim reshape squeeze expand_dims transpose rev slice '
  'copy copy_p stop_gradient iota pad reduce_precision sharding_constraint '
  'optimization_barrier dynamic_slice nextafter rem split'.split()
)

# Of these, what a product reads through: no arithmetic in it.
MOVES = frozenset(
  'broadcast_in_dim reshape squeeze expand_dims transpose rev slice copy '
  'convert_element_type stop_gradient pad sharding_constraint'.split()
)
# The same bytes under another shape.
VIEWS = frozenset(
  'reshape squeeze expand_dims stop_gradient sharding_constraint'.split()
)
SUMS = {'reduce_sum', 'reduce_max', 'reduce_min'}
PRODUCTS = {'dot_general', 'conv_general_dilated'}


def peak_and_traffic(jaxpr, size_of=None):
  """(peak, traffic): bytes alive at once, and bytes moved, arguments left out.

  A model of a compiler that fuses elementwise chains: their values take no
  memory and keep what they are made of alive, unless that is larger than they
  are or a matrix product or convolution reads them. Everything else is written
  once, stored to its last use, and read by each operation that is not itself
  fused. Results and what only results are
  made of are free: they are written into the arguments' place.

  Args:
    jaxpr: from `jax.make_jaxpr`.
    size_of: function from an aval to bytes; None counts all of it.
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
  """Bytes of an array; keys and tokens are counted as nothing."""
  try:
    return num_elements(aval) * np.dtype(aval.dtype).itemsize
  except (TypeError, AttributeError):
    return 0


def _flat(jaxpr):
  """A program's operations, its calls written out: (eqn, inputs, outputs).

  A program traced once may be called twice, so values are (number, variable).
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
  """What a program stores, what it moves, and when values are last read.

  Returns:
    (stored, traffic, last): [(operation, value, bytes)], bytes, and
    {value: the last operation that reads it}.
  """
  tail = _tail(operations)
  readers = {}
  for eqn, inputs, outputs in operations:
    for v in set(inputs) - {None}:
      readers.setdefault(v, []).append((eqn.primitive.name, outputs[0]))
  names = {v: {name for name, _ in found} for v, found in readers.items()}
  operands = {v for v in names if names[v] & PRODUCTS}
  # A loop reads slices of arrays that are there, however simple to make.
  looped = {v for v in names if 'scan' in names[v]}
  # Sums compute their terms as they go; and what has one reader, which is
  # fused and smaller, is stored as that, if at all: in bfloat16, say.
  later = {v for v in names if names[v] <= SUMS}
  least = {}  # value -> bytes of the smallest that it alone becomes
  for _, _, outputs in reversed(operations):
    for v in outputs:
      least[v] = size_of(v[1].aval)
      found = readers.get(v, [])
      if len(found) == 1 and found[0][0] in FUSED:
        least[v] = min(least[v], least[found[0][1]])
        if least[v] < size_of(v[1].aval):
          later.add(v)
  computed = set()  # values with arithmetic since what they are made of
  roots = {}  # value -> {stored value: bytes} it is made of
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
  """Values that are read by nothing but what makes the results."""
  read = set()  # values that something outside the tail reads
  tail = set()
  for eqn, inputs, outputs in reversed(operations):
    fused = eqn.primitive.name in FUSED
    if fused and all(out not in read for out in outputs):
      tail.update(outputs)
    else:
      read.update(v for v in inputs if v is not None)
  return tail
