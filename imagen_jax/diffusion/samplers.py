"""From noise to an image: ancestral DDPM, DDIM and DPM-Solver++ (App. A).

A sampler sees only denoise(z, logsnr) -> x. One step of each of them is a
function with the same arguments,

  step(z, x, noise, *, logsnr_t, logsnr_s, last) -> z_s

where z is z_t, x = denoise(z_t), noise is standard and fresh, and last =
(x, logsnr) of the step before, for those that remember. Before the first step
`last` lies at a log-SNR of −inf. z, x and noise are [B, ...], log-SNRs scalar.
"""

import functools
import hashlib

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.process import diffuse, eps_from_x, posterior
from imagen_jax.diffusion.schedule import alpha_sigma


def ddpm_step(z, x, noise, *, logsnr_t, logsnr_s, last=None, gamma=0.0):
  """The ancestral sampler, its variance interpolated by gamma (eq. 6)."""
  del last
  mean, variance = posterior(
    z, x, logsnr_t=logsnr_t, logsnr_s=logsnr_s, gamma=gamma
  )
  return mean + jnp.sqrt(variance) * noise


def ddim_step(z, x, noise, *, logsnr_t, logsnr_s, last=None, eta=0.0):
  """DDIM: keep the image, shrink the noise (eq. 5; Song et al. 2021).

  eta in [0, 1] replaces that much of the noise's standard deviation by fresh
  noise: 0 is deterministic, 1 is the ancestral sampler with gamma = 0.
  """
  del last
  alpha, sigma = alpha_sigma(logsnr_s)
  fresh = -jnp.expm1(logsnr_t - logsnr_s) * eta**2  # fraction of the variance
  eps = eps_from_x(z, x, logsnr_t)
  return alpha * x + sigma * (
    jnp.sqrt(1 - fresh) * eps + jnp.sqrt(fresh) * noise
  )


def dpmpp_step(z, x, noise, *, logsnr_t, logsnr_s, last):
  """DPM-Solver++(2M): extrapolate x over the step (Lu et al. 2022, alg. 2).

  With h = (logsnr_s − logsnr_t) / 2, the exact solution for constant x is
  z_s = (sigma_s / sigma_t) z_t + alpha_s (1 − e^−h) x, which is DDIM; x at
  the middle of the step instead, on the line through the last two
  predictions, makes it second order. The first step has no past: its h_last
  is infinite, the slope's weight zero.
  """
  del noise
  x_last, logsnr_last = last
  _, sigma_t = alpha_sigma(logsnr_t)
  alpha_s, sigma_s = alpha_sigma(logsnr_s)
  h = (logsnr_s - logsnr_t) / 2
  h_last = (logsnr_t - logsnr_last) / 2
  middle = x + h / (2 * h_last) * (x - x_last)
  return (sigma_s / sigma_t) * z - alpha_s * jnp.expm1(-h) * middle


def sample(
  keys,
  denoise,
  shape,
  *,
  logsnr_fn,
  steps,
  sampler='ddpm',
  gamma=0.0,
  eta=0.0,
  grid='time',
  z=None,
  start=1.0,
  known=None,
  mask=None,
  dtype=jnp.float32,
  return_trajectory=False,
):
  """Images [B, *shape], from noise, in `steps` evaluations of `denoise`.

  Step i goes from the i-th of `steps` + 1 points to the next; the last one
  returns the predicted x itself, without noise. All is one lax.scan, so the
  network is compiled once for any number of steps.

  Args:
    keys: [B], one key per image (`image_key`). Row b's noise depends on
      keys[b] and the step alone, not on the batch it is sampled in.
    denoise: (z [B, *shape], logsnr [B]) -> x [B, *shape].
    shape: of one image, (H, W, C).
    logsnr_fn: the schedule, t -> logsnr.
    steps: a Python int, at least 1.
    sampler: 'ddpm' (with `gamma`), 'ddim' (with `eta`) or 'dpmpp'.
    grid: points evenly spaced in 'time' (the paper) or in 'logsnr'.
    z: [B, *shape], a noisy image to start from; None is pure noise.
    start: the time that z is at, in (0, 1].
    known: [B, *shape], an image to keep where `mask` is 0. There every step
      gets it with the noise that the step expects, and the result has it as
      it is.
    mask: [B, H, W, 1], 1 where to inpaint; None inpaints everywhere.
    dtype: of z and all arithmetic, float32 or wider; z's own if it is given.
    return_trajectory: return (x, {'z': z before each step [steps, B, *shape],
      'x': its prediction, likewise, 'logsnr': [steps]}) instead of x.

  Raises:
    ValueError: steps below 1, or an unknown sampler or grid.
  """
  if steps < 1:
    raise ValueError(f'steps is at least 1, not {steps}')
  match sampler:
    case 'ddpm':
      step, stochastic = functools.partial(ddpm_step, gamma=gamma), True
    case 'ddim':
      step = functools.partial(ddim_step, eta=eta)
      stochastic = not (isinstance(eta, int | float) and eta == 0)
    case 'dpmpp':
      step, stochastic = dpmpp_step, False
    case _:
      raise ValueError(f"sampler is 'ddpm', 'ddim' or 'dpmpp', not {sampler!r}")

  def normal(index):
    row = lambda key: jax.random.normal(
      jax.random.fold_in(key, index), shape, dtype
    )
    return jax.vmap(row)(keys)

  if z is None:
    z = normal(0)
  dtype = z.dtype
  logsnr = _grid(logsnr_fn, start, steps, grid, dtype)

  def body(carry, step_input):
    z, last = carry
    i, logsnr_t, logsnr_s = step_input
    x = denoise(z, jnp.full(z.shape[:1], logsnr_t)).astype(dtype)
    noise = normal(i + 1) if stochastic else jnp.zeros_like(z)
    z_next = step(z, x, noise, logsnr_t=logsnr_t, logsnr_s=logsnr_s, last=last)
    if mask is not None:
      # Noise of its own number, so that an image without a mask stays what
      # it was.
      kept = diffuse(known, normal(steps + 1 + i), logsnr_s)
      z_next = jnp.where(mask > 0, z_next, kept)
      x = jnp.where((mask > 0) | (i < steps - 1), x, known)
    return (z_next, (x, logsnr_t)), (z, x) if return_trajectory else None

  past = jnp.zeros_like(z), jnp.asarray(-jnp.inf, dtype)
  # The last prediction is the result, whatever the step after it would be.
  (_, (x, _)), trajectory = jax.lax.scan(
    body, (z, past), (jnp.arange(steps), logsnr[:-1], logsnr[1:])
  )
  if return_trajectory:
    return x, dict(z=trajectory[0], x=trajectory[1], logsnr=logsnr[:-1])
  return x


def _grid(logsnr_fn, start, steps, grid, dtype):
  """The `steps` + 1 log-SNRs from time `start` down to the data, rising."""
  match grid:
    case 'time':
      return logsnr_fn(jnp.linspace(start, 0.0, steps + 1, dtype=dtype))
    case 'logsnr':
      first, final = logsnr_fn(jnp.asarray([start, 0.0], dtype))
      return jnp.linspace(first, final, steps + 1)
  raise ValueError(f"grid is 'time' or 'logsnr', not {grid!r}")


def image_key(seed, prompt, i):
  """The key of image i of a prompt: the same in every batch and session.

  Threefry by name, not jax's default, so that a seed means the same image
  on every device and in later versions.

  Args:
    seed: in [0, 2³²); jax would drop higher bits without a word.
    prompt: the caption, exactly as given; its first 4 bytes of SHA-256 count.
    i: number of the image among those of the prompt.

  Raises:
    ValueError: the seed is out of range.
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f'a seed is in [0, 2**32), not {seed}')
  key = jax.random.key(seed, impl='threefry2x32')
  digest = hashlib.sha256(prompt.encode('utf-8')).digest()
  key = jax.random.fold_in(key, int.from_bytes(digest[:4], 'big'))
  return jax.random.fold_in(key, i)
