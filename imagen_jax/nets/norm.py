"""The norms of both U-Nets: of pixels (Figure A.27) and of text (2.5).

Variances are E[(x − origin)²], not E[x²] − E[x]², which is 10 % wrong where the
mean is a thousand standard deviations.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from imagen_jax import collectives
from imagen_jax.nets.dense import SAVED
from imagen_jax.typing import Array

LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)


class GroupNorm(nn.Module):
  """Group normalisation with statistics in float32 (Wu and He 2018).

  The same function and parameters as Flax's layer, but faster on CPU: means
  over pixels are taken per channel before channels are grouped, so that XLA
  reads memory in order.

  Attributes:
    num_groups: number of groups; divides the channels.
    dtype: of the result.
    epsilon: added to the variance.
  """

  num_groups: int = 32
  dtype: DTypeLike = jnp.float32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
    """Normalises each group of channels over its pixels; casts to `dtype`."""
    channels = x.shape[-1]
    scale = collectives.gather(
      self.param('scale', nn.initializers.ones, (channels,))
    )
    bias = collectives.gather(
      self.param('bias', nn.initializers.zeros, (channels,))
    )
    x = x.astype(jnp.float32)

    # Channels are mapped to groups and back by a matrix of zeros and ones. XLA
    # would fuse a reshape into the loop over the pixels, which would then
    # divide an index per pixel and could not be vectorised.
    size = channels // self.num_groups
    member = jnp.repeat(jnp.eye(self.num_groups), size, axis=1)
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)

    def over_groups(
      per_channel: Float[Array, '*n c'],
    ) -> Float[Array, '*n c']:
      return dot(dot(per_channel, member.T) / size, member)

    # The origin is any value of the group, so that both means are of one pass
    # over x; the mean itself would need a second.
    origin = jax.lax.stop_gradient(dot(x[:, 0, 0, ::size], member))
    centred = x - origin[:, None, None]
    means = [jnp.mean(y, axis=(1, 2)) for y in (centred, jnp.square(centred))]
    shift, square = checkpoint_name(over_groups(jnp.stack(means)), SAVED)
    variance = jnp.maximum(square - jnp.square(shift), 0)
    mean = origin + shift
    gain = jax.lax.rsqrt(variance + self.epsilon) * scale
    x = x * gain[:, None, None] + (bias - mean * gain)[:, None, None]
    return x.astype(self.dtype)
