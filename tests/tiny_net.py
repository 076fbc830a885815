"""The smallest network that depends on all that a stage's network is given."""

import flax.linen as nn
import jax.numpy as jnp

from imagen_jax.nets.network import Network


class TinyNet(Network):
  """Two convolutions, shifted between them by the noise level and the text.

  It compiles in a fraction of a U-Net's time: for tests of what is around the
  network.
  """

  channels: int = 8
  multiple = 1

  @nn.compact
  def __call__(
    self, z, logsnr, text, mask, low_res=None, aug_level=None, train=False
  ):
    mask = mask[..., None]
    count = jnp.maximum(mask.sum(1), 1)
    given = [jnp.where(mask, text, 0).sum(1) / count, logsnr[:, None] / 10]
    if low_res is not None:
      z = jnp.concatenate([z, low_res], -1)
      given.append(aug_level[:, None])
    shift = nn.Dense(self.channels)(jnp.concatenate(given, -1))
    h = nn.Conv(self.channels, (3, 3))(z) + shift[:, None, None]
    return nn.Conv(3, (3, 3))(nn.silu(h))
