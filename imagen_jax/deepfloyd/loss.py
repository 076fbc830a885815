"""What IF is trained with: the noise's error, and a bound for the variance.

The network says eps and, in three further channels, where the variance of a
step lies between its two limits. The error of eps cannot teach the second, so
Improved DDPM (Nichol and Dhariwal 2021, Section 3.1) adds the variational
bound of one random step, with eps held fixed there: L_simple + λ L_vlb.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr

from imagen_jax.deepfloyd import schedule as schedules

WEIGHT = 0.001  # λ, of the sum of the bound over all steps


def training_plan(made):
  """The `schedule.Plan` of every step t → t − 1, row t: [T] each.

  The last step's lower variance is 0; for its logarithm the one before
  stands in, as in Improved DDPM's code.
  """
  steps = np.arange(made.num_train_timesteps)[::-1]
  plan = schedules.plan(made, steps, 'ddpm')
  plan = schedules.Plan(*(column[::-1] for column in plan))
  low = plan.log_low.copy()
  low[0] = low[1]
  return plan._replace(log_low=low)


def hybrid_loss(key, predict, x, plan, *, weight=WEIGHT):
  """The loss of each image of a batch at a random step.

  Args:
    key: of the steps and the noise.
    predict: (z [B, H, W, C], t [B]) -> [B, H, W, C or 2 C].
    x: [B, H, W, C] in [−1, 1].
    plan: `training_plan(…)`.
    weight: λ; 0, or a network without the variance, leaves L_simple alone.

  Returns:
    ([B] loss, {'t': [B] step over T, 'mse': [B], 'bound': [B]}); the bound is
    in bits per number, over all steps.
  """
  key_t, key_eps = jax.random.split(key)
  total, channels = len(plan.t), x.shape[-1]
  t = jax.random.randint(key_t, x.shape[:1], 0, total)
  eps = jax.random.normal(key_eps, x.shape)
  row = jax.tree.map(
    lambda column: jnp.asarray(column)[t][:, None, None, None], plan
  )
  z = row.alpha * x + row.sigma * eps
  out = predict(z, t)
  guess = out[..., :channels]
  axes = tuple(range(1, x.ndim))
  mse = jnp.mean((guess - eps) ** 2, axis=axes)
  details = {'t': t / total, 'mse': mse, 'bound': jnp.zeros_like(mse)}
  if out.shape[-1] == channels or weight == 0:
    return mse, details
  guess = (z - row.sigma * jax.lax.stop_gradient(guess)) / row.alpha
  fraction = (out[..., channels:] + 1) / 2
  log_variance = row.log_low + fraction * (row.log_high - row.log_low)
  # The means of both share what they owe to z.
  off = row.x * (x - guess)
  divergence = 0.5 * (
    log_variance
    - row.log_low
    - 1
    + jnp.exp(row.log_low - log_variance)
    + off**2 * jnp.exp(-log_variance)
  )
  first = (t == 0)[:, None, None, None]
  bound = jnp.where(first, -log_likelihood(x, guess, log_variance), divergence)
  bound = total / math.log(2) * jnp.mean(bound, axis=axes)
  return mse + weight * bound, details | {'bound': bound}


def log_likelihood(x, mean, log_variance):
  """log of a Gaussian's mass in the 8-bit grey level that x lies in.

  The lowest and the highest level reach to infinity. All [...], in [−1, 1].
  """
  scale = jnp.exp(-0.5 * log_variance)
  above = (x - mean + 1 / 255) * scale
  below = (x - mean - 1 / 255) * scale
  inside = jnp.log(jnp.maximum(ndtr(above) - ndtr(below), 1e-12))
  inside = jnp.where(x > 0.999, log_ndtr(-below), inside)
  return jnp.where(x < -0.999, log_ndtr(above), inside)
