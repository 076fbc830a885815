"""Muon: the momentum of each kernel, orthogonalised (Jordan et al. 2024).

`optax.contrib.muon` does this for one kernel after another, and every device
does all of it. Here kernels of the same shape are stacked, and the devices
divide a stack unless it is little work. The updates are equal up to rounding,
and the state is optax's.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from optax.contrib import MuonDimensionNumbers, MuonState

from imagen_jax import collectives
from imagen_jax.typing import Array

# Of the quintic Newton–Schulz iteration (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROWS = (COEFFICIENTS,) * 5
# Of the update, about Adam's (Liu et al. 2025): its learning rates fit.
RMS = 0.2
# Columns per row from which iterating on the Gram matrix is less work.
WIDE = 3
# Operations of a stack that devices other than CPUs divide: some 0.1 ms at the
# peak of one, to be more than gathering takes. Estimated, not measured.
LEAST = 1e10

Axes = Callable[[tuple, Any], MuonDimensionNumbers | None]
Coefficients = Sequence[Sequence[float]] | Float[np.ndarray, 'steps 3']
Stack = Float[Array, 'k m n']


def muon(
  rate: optax.ScalarOrSchedule,
  axes: Axes,
  *,
  ns_steps: int = 5,
  ns_coeffs: Sequence[float] | Sequence[Sequence[float]] | None = None,
  beta: float = 0.95,
  eps: float = 1e-8,
  nesterov: bool = True,
  weight_decay: float = 0.0,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  adam_b1: float = 0.9,
  adam_b2: float = 0.999,
  adam_weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """Muon for matrices, Adam for all other parameters.

  Args:
    rate: learning rate, a number or a function of the step.
    axes: (path, parameter or its shape) -> the axes that are a matrix's rows
      and columns, any others are of a stack; None for Adam.
    ns_steps: Newton–Schulz iterations.
    ns_coeffs: a, b and c of all iterations, or of each; None is Jordan's.
    beta: decay of Muon's momentum.
    eps: added to norms, and in Adam to the square root of the second moment.
    nesterov: whether the momentum of both is Nesterov's.
    weight_decay: of the matrices, times the learning rate.
    adam_learning_rate: of the other parameters; None is `rate`.
    adam_b1, adam_b2, adam_weight_decay: as in `optax.adamw`.

  Returns:
    an `optax.GradientTransformation`, whose state fits `optax.contrib.muon`'s.

  Raises:
    ValueError: another number of coefficients.
  """

  def labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, x: 'adam' if axes(path, x) is None else 'muon', params
    )

  given = np.asarray(ns_coeffs or (COEFFICIENTS,) * ns_steps, np.float32)
  if given.shape not in ((3,), (ns_steps, 3)):
    raise ValueError(
      f'ns_coeffs has the shape {given.shape}; it takes three numbers, or a '
      f'row of three for each of the {ns_steps} iterations'
    )
  rows = np.broadcast_to(given, (ns_steps, 3))

  def orthogonal(updates: Any, params: Any = None) -> Any:
    return orthogonalised(updates, axes, rows, eps)

  kernels = optax.chain(
    _momentum(beta, nesterov, given),
    optax.stateless(orthogonal),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(rate),
  )
  rest = optax.adamw(
    rate if adam_learning_rate is None else adam_learning_rate,
    b1=adam_b1,
    b2=adam_b2,
    eps=eps,
    weight_decay=adam_weight_decay,
    nesterov=nesterov,
  )
  return optax.partition({'muon': kernels, 'adam': rest}, labels)


def _momentum(
  beta: float, nesterov: bool, coefficients: np.ndarray
) -> optax.GradientTransformation:
  """The average of the gradients, without its bias to zero."""

  def init(params: Any) -> MuonState:
    zeros = optax.tree.zeros_like(params)
    # The coefficients are not read; optax keeps them there.
    kept = jnp.asarray(coefficients)
    return MuonState(jnp.zeros([], jnp.int32), zeros, kept)

  def update(
    updates: Any, state: MuonState, params: Any = None
  ) -> tuple[Any, MuonState]:
    del params
    mu = optax.tree.update_moment(updates, state.mu, beta, 1)
    count = optax.safe_increment(state.count)
    unbiased = optax.tree.bias_correction
    if nesterov:
      found = jax.tree.map(
        lambda m, g: beta * m + (1 - beta) * g,
        unbiased(mu, beta, optax.safe_increment(count)),
        unbiased(updates, beta, count),
      )
    else:
      found = unbiased(mu, beta, count)
    return found, state._replace(count=count, mu=mu)

  return optax.GradientTransformation(init, update)


def orthogonalised(
  tree: Any,
  axes: Axes,
  coefficients: Coefficients = ROWS,
  eps: float = 1e-8,
) -> Any:
  """Every matrix with its singular values near 1, times a factor.

  The factor is `RMS` · √max(rows, columns), which gives entries with the root
  mean square `RMS`. Matrices of one shape, or of its transpose, are stacked,
  and the devices of the mesh divide a stack that is work enough.

  Args:
    tree: of arrays.
    axes: (path, array) -> the axes that are a matrix's rows and columns.
    coefficients: a row for each Newton–Schulz iteration.
    eps: added to the norm of a matrix.
  """
  found = jax.tree_util.tree_leaves_with_path(tree)
  stacks: dict[tuple[int, int], list[Stack]] = collections.defaultdict(list)
  places, back = [], []
  for path, leaf in found:
    stack, undo = _as_stack(leaf, axes(path, leaf))
    number, rows, columns = stack.shape
    group = stacks[rows, columns]
    places.append(((rows, columns), sum(map(len, group)), number))
    back.append(undo)
    group.append(stack)
  function = functools.partial(_divided, coefficients=coefficients, eps=eps)
  done = {
    shape: RMS * shape[1] ** 0.5 * function(jnp.concatenate(group))
    for shape, group in stacks.items()
  }
  leaves = [
    undo(done[shape][start : start + number])
    for (shape, start, number), undo in zip(places, back)
  ]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _as_stack(
  leaf: Array, axes: MuonDimensionNumbers | None
) -> tuple[Stack, Callable[[Stack], Array]]:
  """Matrices with no more rows than columns, and the way back."""
  if axes is None:
    raise ValueError(f'an array of shape {leaf.shape} is no matrix')
  sides = tuple(
    tuple(a % leaf.ndim for a in (side if isinstance(side, tuple) else (side,)))
    for side in (axes.reduction_axis, axes.output_axis)
  )
  rows, columns = sorted(
    sides, key=lambda side: math.prod(leaf.shape[a] for a in side)
  )
  batch = tuple(a for a in range(leaf.ndim) if a not in rows + columns)
  order = batch + rows + columns
  inverse = sorted(range(leaf.ndim), key=order.__getitem__)
  shape = [math.prod(leaf.shape[a] for a in s) for s in (batch, rows, columns)]
  moved = leaf.transpose(order)
  undo = lambda stack: stack.reshape(moved.shape).transpose(inverse)
  return moved.reshape(shape), undo


def _divided(stack: Stack, coefficients: Coefficients, eps: float) -> Stack:
  """`newton_schulz` of a stack, of which each device computes a part."""
  platform, devices = collectives.platform()
  # Products on a TPU or GPU are too imprecise for it.
  gram = platform == 'cpu' and stack.shape[2] >= WIDE * stack.shape[1]
  function = functools.partial(
    newton_schulz, coefficients=coefficients, gram=gram, eps=eps
  )
  work = 4 * stack.size * stack.shape[1] * len(coefficients)
  small = platform != 'cpu' and work < LEAST
  if len(stack) == 1 or devices == 1 or small:
    return function(stack)
  fill = -len(stack) % devices
  padded = jnp.pad(stack, ((0, fill), (0, 0), (0, 0)))
  found = collectives.per_device(function, 0, 0)(padded)
  return collectives.whole(found)[: len(stack)]


def newton_schulz(
  x: Stack,
  coefficients: Coefficients = ROWS,
  *,
  gram: bool = False,
  eps: float = 1e-8,
) -> Stack:
  """About U·Vᵀ of each X = U·S·Vᵀ, with at least as many columns as rows.

  An iteration is X ← (a + b·G + c·G²)·X with G = X·Xᵀ, which moves the singular
  values to about 0.7 to 1.2.

  Args:
    x: matrices; the result is float32.
    coefficients: a, b and c of each iteration.
    gram: whether to iterate on G: as all of these commute, G ← Q·G·Q with
      Q = a + b·G + c·G², and X is multiplied by the product of all Q once. For
      many more columns than rows that is less work. It squares the singular
      values, so that rounding matters more.
    eps: added to the norm of a matrix.
  """
  x = jnp.asarray(x, jnp.float32)
  x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + eps)
  # A loop, not one after the other: the iterations of all shapes of kernels
  # would be most of a program's operations.
  rows = jnp.asarray(coefficients)

  def plain(x: Stack, row: Array) -> tuple[Stack, None]:
    g = x @ x.mT
    return row[0] * x + (row[1] * g + row[2] * g @ g) @ x, None

  if not gram:
    return jax.lax.scan(plain, x, rows)[0]

  def factor(g: Stack, row: Array) -> Stack:
    one = jnp.eye(g.shape[1], dtype=g.dtype)
    return row[0] * one + row[1] * g + row[2] * g @ g

  def step(carry: tuple[Stack, Stack, Stack], row: Array) -> tuple[Any, None]:
    g, q, product = carry
    g = q @ g @ q
    q = factor(g, row)
    return (g, q, q @ product), None

  g = x @ x.mT
  q = factor(g, rows[0])
  (_, _, product), _ = jax.lax.scan(step, (g, q, q), rows[1:])
  return product @ x
