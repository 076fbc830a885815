"""The reverse process: images from noise, with any of the samplers (App. A)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from imagen_jax.diffusion.guidance import Denoise, Memory
from imagen_jax.diffusion.process import diffuse
from imagen_jax.diffusion.samplers import SAMPLERS, SamplerSpec, Step
from imagen_jax.typing import Array, Image, Keys, PixelMask


class Inpaint(NamedTuple):
  """A known image and the mask of the region to inpaint.

  Outside the mask, every step's z is the known image with that step's noise
  level, and the result is the known image itself.

  Attributes:
    known: [B, H, W, C], the image.
    mask: [B, H, W, 1], 1 where to inpaint, 0 where to keep `known`.
  """

  known: Image
  mask: PixelMask


class Trajectory(NamedTuple):
  """The noisy images and predictions of all steps of a sampler.

  Attributes:
    z: [N, B, H, W, C], the noisy image before each step.
    x: [N, B, H, W, C], the prediction at each step; the last is the result.
    logsnr: [N], the log-SNR of z.
  """

  z: Float[Array, 'n b h w c']
  x: Float[Array, 'n b h w c']
  logsnr: Float[Array, ' n']


class State(NamedTuple):
  """What one step of the reverse process leaves to the next.

  Attributes:
    z: [B, H, W, C], the noisy images.
    x: [B, H, W, C], the prediction of the step before; 0 at the first.
    before: the prediction of the step before that.
    memory: of `Reverse.denoise`.
  """

  z: Image
  x: Image
  before: Image
  memory: Memory


class Reverse(NamedTuple):
  """What the reverse process starts from, and how it runs.

  Step i goes from logsnr[i] to logsnr[i + 1]; the last one returns the
  predicted x itself, without noise.

  Attributes:
    keys: [B], one key per image. Row b's noise depends on keys[b] and the step
      only, not on the rest of the batch.
    z: [B, H, W, C], the noisy images at logsnr[0]; arithmetic is in their
      dtype, float32 or wider.
    logsnr: see `logsnr_grid`.
    denoise: (z [B, H, W, C], logsnr [B], memory) -> (x [B, H, W, C], memory).
    spec: the sampler and its options.
    inpaint: what to keep; None generates the whole image.
    memory: what the first call of `denoise` is given, a tree of arrays; every
      other call, what the one before it returned.
  """

  keys: Keys
  z: Image
  logsnr: Float[Array, ' n']
  denoise: Denoise
  spec: SamplerSpec
  inpaint: Inpaint | None = None
  memory: Memory = ()


def initial_noise(keys: Keys, shape: tuple[int, ...]) -> Image:
  """z at t = 1: standard noise [B, *shape], row b from keys[b] alone."""
  return _noise(keys, 0, shape, jnp.float32)


def _noise(
  keys: Keys, index: int | Array, shape: tuple[int, ...], dtype: DTypeLike
) -> Image:
  row = lambda key: jax.random.normal(
    jax.random.fold_in(key, index), shape, dtype
  )
  return jax.vmap(row)(keys)


def num_steps(spec: SamplerSpec, start: float = 1.0) -> int:
  """The number of steps from time `start` to 0, in proportion to it."""
  return max(1, round(spec.steps * start))


def logsnr_grid(
  logsnr_fn: Callable[[Array], Array],
  spec: SamplerSpec,
  *,
  start: float = 1.0,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, ' n']:
  """The increasing log-SNRs of the steps from time `start` to 0.

  Args:
    logsnr_fn: the schedule, t -> logsnr.
    spec: its `grid` and `steps`; there are N = `num_steps` steps, and N + 1
      log-SNRs.
    start: a time in (0, 1].
    dtype: float32 or wider.
  """
  steps = num_steps(spec, start)
  if spec.grid == 'time':
    return logsnr_fn(jnp.linspace(start, 0.0, steps + 1, dtype=dtype))
  first, final = logsnr_fn(jnp.asarray([start, 0.0], dtype))
  return jnp.linspace(first, final, steps + 1)


def sample(reverse: Reverse) -> Image:
  """Samples images from noise, with one evaluation of `denoise` per step.

  The steps are one loop, so the network is compiled once, whatever their
  number. The last prediction is the result; the z after it is not used.
  """
  return advance(reverse, first_state(reverse), 0, _steps(reverse)).x


def first_state(reverse: Reverse) -> State:
  """The state before the first step."""
  none = jnp.zeros_like(reverse.z)
  return State(reverse.z, none, none, reverse.memory)


def advance(
  reverse: Reverse, state: State, first: int | Array, stop: int | Array
) -> State:
  """The state after the steps `first` … `stop` − 1, which may be traced.

  Compiled once for traced numbers, the same program takes all steps in one call
  or a few at a time, with the same result to the bit.
  """
  step = _make_step(reverse)
  return jax.lax.fori_loop(first, stop, lambda i, state: step(state, i), state)


def trajectory(reverse: Reverse) -> Trajectory:
  """The trajectory of `sample`."""
  z, x = _record(reverse, lambda z, x: (z, x))
  return Trajectory(z, x, reverse.logsnr[:-1])


def finite(reverse: Reverse) -> Bool[Array, ' n']:
  """Whether all predictions of `sample` are finite at each step."""
  return _record(reverse, lambda z, x: jnp.isfinite(x).all())


def _record(reverse: Reverse, see: Callable[[Array, Array], Any]) -> Any:
  """`see(z, x)` of all steps, z before and x of each."""
  step = _make_step(reverse)

  def body(state: State, i: Array) -> tuple[State, Any]:
    after = step(state, i)
    return after, see(state.z, after.x)

  steps = jnp.arange(_steps(reverse))
  return jax.lax.scan(body, first_state(reverse), steps)[1]


def _steps(reverse: Reverse) -> int:
  return len(reverse.logsnr) - 1


def _make_step(reverse: Reverse) -> Callable[[State, Array], State]:
  """step(state, i), the state after step i."""
  keys, start, logsnr, denoise, spec, inpaint, _ = reverse
  sampler, steps, dtype = SAMPLERS[spec.sampler], _steps(reverse), start.dtype
  options = {name: getattr(spec, name) for name in sampler.options}
  solve = functools.partial(sampler.step, **options)
  fresh = sampler.stochastic(spec)
  normal = lambda index: _noise(keys, index, start.shape[1:], dtype)
  grid = jnp.concatenate([jnp.full(2, -jnp.inf, dtype), logsnr.astype(dtype)])

  def step(state: State, i: Array) -> State:
    z, x_last, x_before, memory = state
    before, last, t, s = (grid[i + n] for n in range(4))
    x, memory = denoise(z, jnp.full(z.shape[:1], t), memory)
    x = x.astype(dtype)
    noise = normal(i + 1) if fresh else jnp.zeros_like(z)
    at = Step(t, s, (x_last, last), (x_before, before))
    z_next = solve(z, x, noise, at)
    if inpaint is not None:
      # A separate noise index: the sampler's noise is the same without a mask.
      kept = diffuse(inpaint.known, normal(steps + 1 + i), s)
      z_next = jnp.where(inpaint.mask > 0, z_next, kept)
      x = jnp.where((inpaint.mask > 0) | (i < steps - 1), x, inpaint.known)
    return State(z_next, x, x_last, memory)

  return step
