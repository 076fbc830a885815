"""Building blocks of both U-Nets (Appendix F, Figure A.27)."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from imagen_jax.nets.attention import TextPool
from imagen_jax.nets.dense import Conv, Dense
from imagen_jax.nets.norm import GroupNorm
from imagen_jax.typing import Array, AugLevel, LogSNR, TextEmb, TextMask


def sinusoidal(x: Float[Array, ' b'], dim: int) -> Float[Array, 'b {dim}']:
  """Sine and cosine features of a number in [0, 1], in float32.

  Frequencies fall geometrically from 1000 to 0.1, as the Transformer's do for
  positions 0…1000; `dim` is even.
  """
  frequencies = 1000.0 * jnp.exp(
    -math.log(10000.0) * jnp.arange(dim // 2) / (dim // 2 - 1)
  )
  angles = x.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def noise_angle(logsnr: LogSNR) -> LogSNR:
  """A log-SNR as the angle atan(sigma/alpha)·2/π in [0, 1], in float32.

  This is the time at which the untruncated cosine schedule has this log-SNR,
  whatever the schedule in use: the networks are conditioned on the noise
  level, not on the time (Appendix A).
  """
  return jnp.arctan2(
    jnp.exp(-0.5 * jnp.clip(logsnr.astype(jnp.float32), -20, 20)), 1.0
  ) * (2 / math.pi)


class Conditioning(nn.Module):
  """The conditioning vector: time, augmentation, pooled text (Figure A.28).

  Attributes:
    features: width of the vector (4 × channels in the base model).
    sinusoid: number of sinusoidal features (the model's channels).
    pool_head_dim: head size of the text pooler.
    dtype: computation type.
  """

  features: int
  sinusoid: int
  pool_head_dim: int = 64
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    logsnr: LogSNR,
    text: TextEmb,
    mask: TextMask,
    aug_level: AugLevel | None = None,
  ) -> Float[Array, 'b {self.features}']:
    """`aug_level` is None for a model without low-resolution input."""

    def mlp(x: Float[Array, ' b'], name: str) -> Float[Array, 'b features']:
      h = sinusoidal(x, self.sinusoid).astype(self.dtype)
      h = Dense(self.features, dtype=self.dtype, name=f'{name}_in')(h)
      return Dense(self.features, dtype=self.dtype, name=f'{name}_out')(
        nn.swish(h)
      )

    emb = mlp(noise_angle(logsnr), 'time')
    if aug_level is not None:
      emb = emb + mlp(aug_level, 'aug')
    return emb + TextPool(
      self.features,
      head_dim=self.pool_head_dim,
      dtype=self.dtype,
      name='text_pool',
    )(text, mask)


def conv(
  features: int,
  *,
  kernel: int = 3,
  strides: int = 1,
  zero: bool = False,
  dtype: DTypeLike,
  name: str,
) -> nn.Module:
  """A convolution with SAME padding; `zero` initialises its kernel to 0."""
  return Conv(
    features,
    (kernel, kernel),
    strides=(strides, strides),
    padding='SAME',
    kernel_init=nn.initializers.zeros
    if zero
    else nn.initializers.lecun_normal(),
    dtype=dtype,
    name=name,
  )


def conv_in(
  x: Float[Array, 'b h w c'], features: int, dtype: DTypeLike
) -> Float[Array, 'b h w {features}']:
  """The first convolution, in float32 whatever the computation type.

  At a high log-SNR z differs from the image by less than bfloat16 resolves: 8
  bits of a number near 1 are 2⁻⁸ = 0.0039, the noise at a log-SNR of 11.
  """
  first = Conv(
    features, (3, 3), dtype=jnp.float32, precision='highest', name='conv_in'
  )
  return first(x).astype(dtype)


def downsample(x: Float[Array, 'b h w c']) -> Float[Array, 'b h//2 w//2 c']:
  """2×2 average pooling."""
  return nn.avg_pool(x, (2, 2), strides=(2, 2))


def upsample(x: Float[Array, 'b h w c']) -> Float[Array, 'b 2*h 2*w c']:
  """2× nearest-neighbour upsampling."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


# {a residual block's `resample`: the function}
RESAMPLE: dict[str | None, Callable] = {
  None: lambda h: h,
  'down': downsample,
  'up': upsample,
}


class ResBlock(nn.Module):
  """A residual block with scale-shift conditioning (BigGAN; Figure A.27).

  GroupNorm → swish → [resample] → conv3×3 → GroupNorm·(1+scale)+shift → swish
  → conv3×3 (zero-initialised), plus a shortcut. scale and shift come from the
  conditioning vector.

  Attributes:
    features: channels of the result.
    resample: None, 'down' (average pooling) or 'up' (nearest), on both paths.
    residual_scale: factor of the residual sum; 1/√2 in the Efficient U-Net
      (B.1), which keeps the variance constant over many blocks.
    conv_shortcut: a 1×1 convolution on the shortcut even where the width does
      not change (as in Figure A.27).
    dropout: rate before the second convolution.
    norm_groups: groups of the GroupNorms.
    dtype: computation type.
  """

  features: int
  resample: str | None = None
  residual_scale: float = 1.0
  conv_shortcut: bool = False
  dropout: float = 0.0
  norm_groups: int = 32
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b h w c'],
    emb: Float[Array, 'b e'],
    train: bool = False,
  ) -> Float[Array, 'b h2 w2 {self.features}']:
    """Applies the block to x, given the conditioning vector."""
    resample = RESAMPLE[self.resample]
    h = GroupNorm(self.norm_groups, dtype=self.dtype, name='norm1')(x)
    h = resample(nn.swish(h))
    h = conv(self.features, dtype=self.dtype, name='conv1')(h)
    film = Dense(2 * self.features, dtype=self.dtype, name='film')(
      nn.swish(emb)
    )
    scale, shift = jnp.split(film[:, None, None, :], 2, axis=-1)
    h = GroupNorm(self.norm_groups, dtype=self.dtype, name='norm2')(h)
    h = nn.swish(h * (1 + scale) + shift)
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    h = conv(self.features, zero=True, dtype=self.dtype, name='conv2')(h)
    x = resample(x)
    if self.conv_shortcut or x.shape[-1] != self.features:
      x = conv(self.features, kernel=1, dtype=self.dtype, name='shortcut')(x)
    return (x + h) * jnp.asarray(self.residual_scale, h.dtype)
