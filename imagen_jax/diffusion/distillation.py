"""Distillation: one step of a student for several of its teacher's.

Progressive distillation (Salimans and Ho 2022) of a guided teacher (Meng et al.
2023): the student learns the x with which one DDIM step ends where the
teacher's steps end. In terms of z / sigma, a DDIM step from t to s adds

  (u_s − u_t) x,   u = alpha / sigma,

so that x is the mean of the teacher's predictions over the student's step, with
the weights of their parts of the increase of u. At the last step, where sigma
ends at 0, it is the teacher's last prediction.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from imagen_jax.diffusion.loss import LossSpec, times, weighted_error
from imagen_jax.diffusion.process import diffuse, eps_from_x, over, target
from imagen_jax.diffusion.samplers import Step, ddim_step
from imagen_jax.typing import Array, Image, LogSNR, PixelMask

Grid = Float[Array, ' n']
Denoise = Callable[[Array, Array], Array]


def teacher_target(
  z: Image, index: Array, denoise: Denoise, *, grid: Grid, parts: int
) -> Image:
  """The student's x at the beginning of its step, from the teacher's steps.

  Args:
    z: [B, ...], noisy images at the beginning of the step.
    index: [B] int, number of the step, 0 at t = 1.
    denoise: the teacher, guided: (z, logsnr [B]) -> x.
    grid: the log-SNRs of the teacher's steps, see `reverse.logsnr_grid`.
    parts: teacher's steps for one of the student's, a divisor of their number.
  """
  ratio = jnp.exp(grid / 2)  # u = alpha / sigma
  # The last step ends at the teacher's prediction itself.
  ratio = ratio.at[-1].set(jnp.inf)
  first = index * parts
  total, last = jnp.zeros_like(z), first + parts == len(grid) - 1
  whole = ratio[first + parts] - ratio[first]
  for part in range(parts):
    here, there = first + part, first + part + 1
    x = denoise(z, grid[here])
    share = (ratio[there] - ratio[here]) / whole
    share = jnp.where(last, float(part == parts - 1), share)
    total = total + over(x, share) * x
    at = Step(over(z, grid[here]), over(z, grid[there]))
    z = ddim_step(z, x, jnp.zeros_like(z), at)
  return total


def distillation_loss(
  key: jax.Array,
  x: Image,
  predict: Denoise,
  denoise: Denoise,
  *,
  grid: Grid,
  parts: int,
  spec: LossSpec,
  pixel_weight: PixelMask | None = None,
  t: LogSNR | None = None,
) -> tuple[LogSNR, dict[str, LogSNR]]:
  """The weighted squared error of a student at a random one of its steps.

  Args:
    key: a jax.random key.
    x: [B, H, W, C], images in [−1, 1], to which noise is added.
    predict: the student: (z, logsnr [B]) -> the network's output.
    denoise, grid, parts: see `teacher_target`.
    spec, pixel_weight: see `diffusion_loss`; without a slope, 'sigmoid' is no
      weighting here.
    t: [B] in [0, 1), times whose steps are taken; None samples them.

  Returns:
    as `diffusion_loss`; `t` is the time at which the step begins.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  key_t, key_eps = jax.random.split(key)
  steps = (len(grid) - 1) // parts
  if t is None:
    t = times(key_t, len(x), stratified=spec.stratified, dtype=x.dtype)
  index = steps - 1 - jnp.floor(t * steps).astype(jnp.int32)
  logsnr = grid[index * parts]
  z = diffuse(x, jax.random.normal(key_eps, x.shape, x.dtype), logsnr)
  aim = teacher_target(z, index, denoise, grid=grid, parts=parts)
  aim = jax.lax.stop_gradient(aim)
  aim = target(spec.prediction, aim, eps_from_x(z, aim, logsnr), logsnr)
  return weighted_error(
    predict(z, logsnr).astype(x.dtype),
    aim,
    t=(steps - index) / steps,
    logsnr=logsnr,
    spec=spec,
    pixel_weight=pixel_weight,
  )
