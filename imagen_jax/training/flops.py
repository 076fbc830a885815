"""FLOPs of a traced program, counted before compilation.

The trace is that of the step that will run. A loop's body counts once per
iteration; XLA's own cost analysis counts it once.

MFU, the model FLOPs utilization, counts what the mathematics of a step needs;
HFU, the hardware FLOPs utilization, counts what rematerialization repeats too
(Chowdhery et al. 2022, PaLM, appendix B).
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.extend.core.primitives import remat_p

F = TypeVar('F', bound=Callable)

# Parameters under which an operation holds an inner program.
_INNER = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')


def inner_jaxpr(eqn: JaxprEqn) -> Jaxpr | None:
  """The program that an operation calls once, or None.

  Of a conditional, its most expensive branch; the last inputs are its own.
  """
  if eqn.primitive.name == 'cond':
    return max(eqn.params['branches'], key=count_flops).jaxpr
  for name in _INNER:
    inner = eqn.params.get(name)
    if inner is not None:
      return getattr(inner, 'jaxpr', inner)
  return None


def has_remat(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
  """Whether a program holds a part that `jax.checkpoint` wraps."""
  return any(
    eqn.primitive is remat_p
    or any(has_remat(inner) for inner in _programs(eqn.params))
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns
  )


def convolutions(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
  """The convolutions of a program, each where it is written."""
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    if eqn.primitive.name == 'conv_general_dilated':
      yield eqn
    for inner in _programs(eqn.params):
      yield from convolutions(inner)


def without_remat(function: F) -> F:
  """The same function, whose gradient computes nothing a second time.

  For counting FLOPs: it has the values of `function`, and takes the memory that
  `jax.checkpoint` would have saved.
  """

  @functools.wraps(function)
  def saving(*args: Any) -> Any:
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    run = jaxpr_as_fun(_saving(traced))
    tree = jax.tree.structure(shapes)
    return jax.tree.unflatten(tree, run(*jax.tree.leaves(args)))

  return saving  # type: ignore[return-value]


def _programs(params: dict[str, Any]) -> list[Jaxpr | ClosedJaxpr]:
  """The programs among an operation's parameters."""
  found = jax.tree.leaves(list(params.values()))
  return [x for x in found if isinstance(x, Jaxpr | ClosedJaxpr)]


def _saving(value: Any) -> Any:
  """A program, or several, in which `jax.checkpoint` saves everything."""
  # From jax 0.12.0.1 on a program and a closed one are the same type.
  if isinstance(value, ClosedJaxpr) and value.jaxpr is not value:
    return value.replace(jaxpr=_saving(value.jaxpr))
  if isinstance(value, tuple) and _programs({'': value}):
    return tuple(map(_saving, value))
  if not isinstance(value, Jaxpr):
    return value
  eqns = []
  for eqn in value.eqns:
    params = {name: _saving(param) for name, param in eqn.params.items()}
    if eqn.primitive is remat_p:
      params['policy'] = jax.checkpoint_policies.everything_saveable
    eqns.append(eqn.replace(params=params))
  return value.replace(eqns=eqns)


def count_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
  """FLOPs of a program; a multiplication and an addition count one each.

  Matrix products and convolutions count their terms, padding excluded;
  elementwise operations and reductions count one per element, as in XLA.
  A conditional counts its most expensive branch, a `while` its body once.
  """
  total = 0.0
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    name = eqn.primitive.name
    if name == 'dot_general':
      total += _dot_flops(eqn)
    elif name == 'conv_general_dilated':
      total += _conv_flops(eqn)
    elif name == 'scan':
      total += eqn.params['length'] * count_flops(eqn.params['jaxpr'])
    elif name == 'while':
      total += count_flops(eqn.params['body_jaxpr'])
    elif (inner := inner_jaxpr(eqn)) is not None:
      # A shard_map's program is that of one device.
      copies = eqn.params['mesh'].size if name == 'shard_map' else 1
      total += copies * count_flops(inner)
    elif name.startswith(('reduce_', 'cum', 'arg')):
      total += num_elements(eqn.invars[0].aval)
    elif name in _ARITHMETIC:
      total += num_elements(eqn.outvars[0].aval)
  return total


_ARITHMETIC = frozenset(
  'add add_any sub mul div neg max min sign abs sqrt rsqrt square integer_pow '
  'floor clamp select_n eq ne lt le gt ge and or xor not is_finite'.split()
)


def num_elements(aval: Any) -> int:
  """Number of elements of an array."""
  return math.prod(getattr(aval, 'shape', ()))


def _shape(var: Any) -> tuple[int, ...]:
  return var.aval.shape


def _dot_flops(eqn: JaxprEqn) -> float:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left = _shape(eqn.invars[0])
  depth = math.prod(left[i] for i in contracted)
  return 2.0 * num_elements(eqn.outvars[0].aval) * depth


def _conv_flops(eqn: JaxprEqn) -> float:
  p = eqn.params
  numbers = p['dimension_numbers']
  left, right = _shape(eqn.invars[0]), _shape(eqn.invars[1])
  out = _shape(eqn.outvars[0])
  # (output, tap) pairs that read a real input, in all dimensions.
  pairs = 1
  for d in range(len(out) - 2):
    size, kernel = left[numbers.lhs_spec[2 + d]], right[numbers.rhs_spec[2 + d]]
    outputs = np.arange(out[numbers.out_spec[2 + d]]) * p['window_strides'][d]
    taps = np.arange(kernel) * p['rhs_dilation'][d] - p['padding'][d][0]
    place, dilation = outputs[:, None] + taps, p['lhs_dilation'][d]
    inside = (place >= 0) & (place <= (size - 1) * dilation)
    pairs *= int(np.sum(inside & (place % dilation == 0)))
  batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
  return 2.0 * batch * features * right[numbers.rhs_spec[1]] * pairs
