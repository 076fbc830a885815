"""IF's training loss: L_simple + λ L_vlb.

The network predicts eps and, in three further channels, where the variance of a
step lies between its two limits. L_simple gives the variance no gradient, so
Improved DDPM (Nichol and Dhariwal 2021, Section 3.1) adds the variational bound
of one random step, without its gradient with respect to eps.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr
from jaxtyping import Float

from imagen_jax.deepfloyd import schedule as schedules
from imagen_jax.typing import Array, Image, Scalars, Values

WEIGHT = 0.001  # λ, the weight of the bound summed over all steps


def training_plan(made: schedules.Schedule) -> schedules.Plan:
  """The `schedule.Plan` of all steps: row t is the step t → t − 1, [T] each.

  The lower variance of row 0 is 0; its logarithm is replaced by that of row 1,
  as in Improved DDPM's code.
  """
  steps = np.arange(made.num_train_timesteps)[::-1]
  plan = schedules.plan(made, steps, 'ddpm')
  plan = schedules.Plan(*(column[::-1] for column in plan))
  low = plan.log_low.copy()
  low[0] = low[1]
  return plan._replace(log_low=low)


def hybrid_loss(
  key: jax.Array,
  predict: Callable[[Image, Array], Image],
  x: Image,
  plan: schedules.Plan,
  *,
  weight: float = WEIGHT,
) -> tuple[Float[Array, ' b'], dict[str, Array]]:
  """The loss of each image of a batch at a random step.

  Args:
    key: for the steps and the noise.
    predict: (z [B, H, W, C], t [B]) -> [B, H, W, C or 2 C].
    x: [B, H, W, C] in [−1, 1].
    plan: `training_plan(…)`.
    weight: λ. If it is 0 or the network has no variance channels, the loss is
      L_simple alone.

  Returns:
    ([B] loss, {'t': [B] step over T, 'mse': [B], 'bound': [B]}); the bound is
    in bits per dimension, scaled by T to estimate the sum over all steps.
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
  details: dict[str, Array] = {
    't': t / total,
    'mse': mse,
    'bound': jnp.zeros_like(mse),
  }
  if out.shape[-1] == channels or weight == 0:
    return mse, details
  guess = (z - row.sigma * jax.lax.stop_gradient(guess)) / row.alpha
  fraction = (out[..., channels:] + 1) / 2
  log_variance = row.log_low + fraction * (row.log_high - row.log_low)
  # The z terms of the two means cancel.
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


def log_likelihood(x: Values, mean: Scalars, log_variance: Scalars) -> Values:
  """Log probability of x's 8-bit level under a Gaussian.

  The lowest and the highest level extend to infinity. All [...]; x and mean in
  [−1, 1].
  """
  scale = jnp.exp(-0.5 * log_variance)
  above = (x - mean + 1 / 255) * scale
  below = (x - mean - 1 / 255) * scale
  inside = jnp.log(jnp.maximum(ndtr(above) - ndtr(below), 1e-12))
  inside = jnp.where(x > 0.999, log_ndtr(-below), inside)
  return jnp.where(x < -0.999, log_ndtr(above), inside)
