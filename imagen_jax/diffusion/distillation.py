"""Distillation: one step of a student for several of its teacher's.

`distillation_loss` is progressive distillation (Salimans and Ho 2022) of a
guided teacher (Meng et al. 2023): the student learns the x with which one DDIM
step ends where the teacher's steps end. In terms of z / sigma, a DDIM step from
t to s adds

  (u_s − u_t) x,   u = alpha / sigma,

so that x is the mean of the teacher's predictions over the student's step, with
the weights of their parts of the increase of u. At the last step, where sigma
ends at 0, it is the teacher's last prediction.

`moment_loss` is moment matching (Salimans et al. 2024): the student's steps are
random, as the ancestral sampler's, and what is matched is their distribution.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from imagen_jax.diffusion.loss import LossSpec, times, weighted_error
from imagen_jax.diffusion.process import (
  diffuse,
  eps_from_x,
  over,
  posterior,
  target,
  to_x,
)
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


def moment_loss(
  key: jax.Array,
  x: Image,
  student: Denoise,
  auxiliary: Denoise,
  denoise: Denoise,
  *,
  grid: Grid,
  parts: int,
  spec: LossSpec,
  finish: Callable[[Array], Array] = lambda x: x,
  pixel_weight: PixelMask | None = None,
  t: LogSNR | None = None,
) -> tuple[LogSNR, dict[str, LogSNR]]:
  """Matches the mean of x given z_s under the student with its teacher's.

  From z_t at the beginning of one of its steps the student predicts x̃, and z_s
  ~ q(z_s | z_t, x̃) is a noisy image inside the step. If the student's images
  were distributed as the teacher's data, E[x̃ | z_s] would be the teacher's
  prediction. An auxiliary network learns the average of the two, and the
  student follows its difference from the teacher's, which is half of theirs
  (Salimans et al. 2024, Algorithm 2, with both networks updated in every step):

    L(auxiliary) = ‖x̃ − g‖² + ‖x_teacher − g‖²,   g = auxiliary(z_s)
    L(student)   = w(s) x̃ · (g − x_teacher),      w = min(1 / sigma_s², 20)

  The weight is a choice of this project. The second one is written as a square
  with the same gradient, so that its value is w / 2 times the mean square of g
  − x_teacher. The result is their sum.

  Args:
    key: a jax.random key.
    x: [B, H, W, C], images in [−1, 1], to which noise is added.
    student, auxiliary: (z, logsnr [B]) -> the network's output.
    denoise: the teacher, guided: (z, logsnr [B]) -> x.
    grid: log-SNRs, `parts` intervals for a step of the student; s is one of
      their ends.
    parts: see there.
    spec: of the auxiliary network's error, see `LossSpec`.
    finish: what the sampler does to a prediction, such as thresholding.
    pixel_weight: see `diffusion_loss`.
    t: [B] in [0, 1), times whose steps are taken; None samples them.

  Returns:
    as `diffusion_loss`; `t` is the time at which the step begins, and `mse` the
    mean square of g − x_teacher.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  key_t, key_s, key_eps, key_z = jax.random.split(key, 4)
  steps = (len(grid) - 1) // parts
  if t is None:
    t = times(key_t, len(x), stratified=spec.stratified, dtype=x.dtype)
  index = steps - 1 - jnp.floor(t * steps).astype(jnp.int32)
  inside = jax.random.randint(key_s, t.shape, 1, parts + 1)
  logsnr_t, logsnr = grid[index * parts], grid[index * parts + inside]

  normal = lambda key: jax.random.normal(key, x.shape, x.dtype)
  z_t = diffuse(x, normal(key_eps), logsnr_t)
  made = to_x(spec.prediction, student(z_t, logsnr_t), z_t, logsnr_t)
  sampled = finish(jax.lax.stop_gradient(made))
  mean, variance = posterior(z_t, sampled, logsnr_t=logsnr_t, logsnr_s=logsnr)
  z = mean + jnp.sqrt(variance) * normal(key_z)

  wanted = jax.lax.stop_gradient(denoise(z, logsnr))
  output = auxiliary(z, logsnr).astype(x.dtype)
  error = functools.partial(
    weighted_error, t=t, logsnr=logsnr, pixel_weight=pixel_weight
  )
  total = jnp.zeros_like(t)
  for aim in sampled, wanted:
    aim = target(spec.prediction, aim, eps_from_x(z, aim, logsnr), logsnr)
    total += error(output, aim, spec=spec)[0]
  guess = jax.lax.stop_gradient(to_x(spec.prediction, output, z, logsnr))
  aim = jax.lax.stop_gradient(made) - (guess - wanted)
  mse, _ = error(made, aim, spec=LossSpec(prediction='x'))
  weight = jnp.minimum(1 / jax.nn.sigmoid(-logsnr), 20)
  details = dict(t=(steps - index) / steps, logsnr=logsnr, mse=mse)
  return total + weight * mse / 2, details | {'weight': weight}
