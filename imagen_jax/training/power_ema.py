"""Power-function EMAs, and EMAs of any length from their snapshots.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", section 3 and appendix C. The average of the parameters θ at step t,

  θ̂_γ(t) = ∫₀ᵗ τ^γ θ(τ) dτ / ∫₀ᵗ τ^γ dτ,

grows with the run, needs no warm-up and forgets the initial parameters. Its
length is σ_rel, the standard deviation of the profile τ^γ as a fraction of t.
An average that was not tracked is a sum of stored ones whose profiles add up to
nearly its own.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.io.files import AnyPath
from imagen_jax.typing import Array

FOLDER = 'ema'  # of the snapshots, in that of the checkpoints
LONGEST = 0.28  # γ > 0; a plain average of all steps (γ = 0) has 12^-1/2
# Of the fit: the L2 norm of the difference from the profile, as a fraction.
MAX_ERROR = 0.1

Tree = Any  # nested dicts of arrays
Emas: TypeAlias = dict[str, Tree]  # {length: average}


def power(length: float) -> float:
  """The exponent γ of an EMA's length.

  σ_rel = (γ + 1)^1/2 (γ + 2)^-1 (γ + 3)^-1/2, a cubic equation in γ.

  Args:
    length: σ_rel, in (0, `LONGEST`].
  """
  s = length**2
  return np.roots([s, 7 * s, 16 * s - 1, 12 * s - 1]).real.max()


def start(params: Tree, lengths: Sequence[float] | None) -> Emas:
  """The averages before the first step; their values have no weight."""
  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  return {str(length): zeros(params) for length in lengths or ()}


def update(emas: Emas, params: Tree, step: Array) -> Emas:
  """The averages after a step: θ̂(t) = β θ̂(t − 1) + (1 − β) θ(t).

  With β = (1 − 1/t)^(γ + 1), the weight of θ(τ) in θ̂(t) is the integral of the
  profile from τ − 1 to τ.

  Args:
    emas: the averages.
    params: after the step.
    step: its number t, from 1.
  """
  log = jnp.log1p(-1 / step.astype(jnp.float32))

  def average(length: str, ema: Tree) -> Tree:
    new = -jnp.expm1((power(float(length)) + 1) * log)
    return jax.tree.map(lambda e, p: e + new * (p - e), ema, params)

  return {length: average(length, ema) for length, ema in emas.items()}


def inner(
  t: ArrayLike, gamma: ArrayLike, s: ArrayLike, delta: ArrayLike
) -> np.ndarray:
  """∫ p(τ) q(τ) dτ of the profiles of (step t, γ) and (step s, δ)."""
  a, b = np.add(gamma, 1), np.add(delta, 1)
  powers = (a + b - 1) * np.log(np.minimum(t, s))
  powers = powers - a * np.log(t) - b * np.log(s)
  return a * b / (a + b - 1) * np.exp(powers)


def fit(
  steps: Sequence[int], lengths: Sequence[float], step: int, length: float
) -> tuple[Float[np.ndarray, 'steps lengths'], float]:
  """The weights of the snapshots whose sum is nearest to an EMA's profile.

  Args:
    steps: of the snapshots.
    lengths: of the averages in each.
    step, length: of the wanted average, which may be one of them.

  Returns:
    (weights, which add up to 1; the L2 norm of the profiles' difference as a
    fraction of the wanted profile's).
  """
  if step in steps and length in lengths:  # it was tracked: no rounding
    return np.equal.outer(steps, [step]) * np.equal(lengths, length), 0.0
  t, gamma = (
    grid.ravel()
    for grid in np.meshgrid(
      np.asarray(steps, float), [power(x) for x in lengths], indexing='ij'
    )
  )
  wanted = float(step), power(length)
  norms = np.sqrt(inner(t, gamma, t, gamma))
  products = inner(t[:, None], gamma[:, None], t, gamma)
  found = inner(t, gamma, *wanted) / norms
  x, *_ = np.linalg.lstsq(products / norms / norms[:, None], found, rcond=None)
  error = np.sqrt(max(0, 1 - found @ x / inner(*wanted, *wanted)))
  weights = x / norms
  # So that the average of equal numbers is that number.
  weights = weights.reshape(len(steps), len(lengths)) / weights.sum()
  return weights, float(error)


def _snapshot(snapshots: Checkpoints, step: int) -> dict[str, Tree]:
  """{length: average} of a snapshot."""
  try:
    return snapshots.restore_subtree('emas', step)[0]
  except ModelError as error:
    raise ModelError(
      f'{error} Remove {snapshots.directory / str(step)}, and the others are '
      'used without it.'
    ) from error


def reconstruct(
  checkpoint_dir: AnyPath,
  lengths: Sequence[float] | None,
  length: float,
  step: int | None = None,
) -> tuple[Tree, int]:
  """The EMA of any length from the snapshots of a run.

  Args:
    checkpoint_dir: of the run.
    lengths: the config's `train.ema_lengths`.
    length: σ_rel of the wanted average.
    step: at which snapshot it ends; the newest by default.

  Returns:
    (nested dict of float32 numpy arrays, step).

  Raises:
    UsageError: the length is out of range, or the snapshots are too few for it;
      or there is none of this step.
    ModelError: there are no snapshots, or one is damaged.
  """
  if not 0 < length <= LONGEST:
    raise UsageError(
      f'ema is {length}; it must be in (0, {LONGEST}].', key='ema'
    )
  with Checkpoints(f'{checkpoint_dir}/{FOLDER}') as snapshots:
    steps = snapshots.all_steps()
    if not lengths or not steps:
      raise ModelError(
        f'{snapshots.directory} holds no snapshots of EMAs; training stores '
        'them with --config.train.ema_lengths=0.05,0.1.'
      )
    step = steps[-1] if step is None else step
    if step not in steps:
      raise UsageError(
        f'step is {step}; there are snapshots of {", ".join(map(str, steps))}.',
        key='step',
      )
    steps = [s for s in steps if s <= step]
    weights, error = fit(steps, lengths, step, length)
    if error > MAX_ERROR:
      raise UsageError(
        f'ema is {length}, whose profile {len(steps)} snapshots of the lengths '
        f'{", ".join(map(str, lengths))} fit to {error:.0%} only; choose one '
        'nearer to these, or more snapshots (train.ema_every).',
        key='ema',
      )
    total: Tree = 0.0
    for s, row in zip(steps, weights):
      if row.any():
        stored = _snapshot(snapshots, s)
        for name, weight in zip(map(str, lengths), row):
          add = lambda x, w=weight: w * x.astype(np.float64)
          part = jax.tree.map(add, stored[name])
          total = part if total == 0.0 else jax.tree.map(np.add, total, part)
  return jax.tree.map(lambda x: x.astype(np.float32), total), step
