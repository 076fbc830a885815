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
from imagen_jax.diffusion.samplers import SAMPLERS, Past, SamplerSpec, Step
from imagen_jax.typing import Array, Image, Keys, PixelMask

Carry = tuple[Array, Past, Past, Memory]


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


def initial_noise(
  keys: Keys, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Image:
  """z at t = 1: standard noise [B, *shape], row b from keys[b] alone."""
  return _noise(keys, 0, shape, dtype)


def _noise(
  keys: Keys, index: int | Array, shape: tuple[int, ...], dtype: DTypeLike
) -> Image:
  row = lambda key: jax.random.normal(
    jax.random.fold_in(key, index), shape, dtype
  )
  return jax.vmap(row)(keys)


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
    spec: its `grid` and `steps`; there are N = max(1, round(steps · start))
      steps, and N + 1 log-SNRs.
    start: a time in (0, 1].
    dtype: float32 or wider.
  """
  steps = max(1, round(spec.steps * start))
  if spec.grid == 'time':
    return logsnr_fn(jnp.linspace(start, 0.0, steps + 1, dtype=dtype))
  first, final = logsnr_fn(jnp.asarray([start, 0.0], dtype))
  return jnp.linspace(first, final, steps + 1)


def sample(reverse: Reverse) -> Image:
  """Samples images from noise, with one evaluation of `denoise` per step.

  The steps are one lax.scan, so the network is compiled once, whatever their
  number.
  """
  return _run(reverse, lambda z, x: None)[0]


def trajectory(reverse: Reverse) -> Trajectory:
  """The trajectory of `sample`."""
  _, (z, x) = _run(reverse, lambda z, x: (z, x))
  return Trajectory(z, x, reverse.logsnr[:-1])


def finite(reverse: Reverse) -> Bool[Array, ' n']:
  """Whether all predictions of `sample` are finite at each step."""
  return _run(reverse, lambda z, x: jnp.isfinite(x).all())[1]


def _run(
  reverse: Reverse, record: Callable[[Array, Array], Any]
) -> tuple[Image, Any]:
  """(images, `record(z, x)` of all steps)."""
  keys, z, logsnr, denoise, spec, inpaint, memory = reverse
  sampler, steps, dtype = SAMPLERS[spec.sampler], len(logsnr) - 1, z.dtype
  options = {name: getattr(spec, name) for name in sampler.options}
  step = functools.partial(sampler.step, **options)
  fresh = sampler.stochastic(spec)
  normal = lambda index: _noise(keys, index, z.shape[1:], dtype)

  def body(
    carry: Carry, step_input: tuple[Array, Array, Array]
  ) -> tuple[Carry, Any]:
    z, last, before, memory = carry
    i, logsnr_t, logsnr_s = step_input
    x, memory = denoise(z, jnp.full(z.shape[:1], logsnr_t), memory)
    x = x.astype(dtype)
    noise = normal(i + 1) if fresh else jnp.zeros_like(z)
    z_next = step(z, x, noise, Step(logsnr_t, logsnr_s, last, before))
    if inpaint is not None:
      # A separate noise index: the sampler's noise is the same without a mask.
      kept = diffuse(inpaint.known, normal(steps + 1 + i), logsnr_s)
      z_next = jnp.where(inpaint.mask > 0, z_next, kept)
      x = jnp.where((inpaint.mask > 0) | (i < steps - 1), x, inpaint.known)
    return (z_next, (x, logsnr_t), last, memory), record(z, x)

  past: Past = jnp.zeros_like(z), jnp.asarray(-jnp.inf, dtype)
  # The result is the last prediction; the z after it is not used.
  (_, (x, _), _, _), seen = jax.lax.scan(
    body, (z, past, past, memory), (jnp.arange(steps), logsnr[:-1], logsnr[1:])
  )
  return x, seen
