"""The base model's U-Net (Sections 2.5 and 4.1, Appendix F.1).

Dhariwal and Nichol's ADM with more channels: BigGAN residual blocks for
resampling, scale-shift normalisation, and attention over [text; pixels] after
every residual block at the lower resolutions.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from imagen_jax.nets.attention import TextAttention
from imagen_jax.nets.dense import Dense
from imagen_jax.nets.layers import (
  Conditioning,
  ResBlock,
  conv,
  conv_in,
)
from imagen_jax.nets.network import Network
from imagen_jax.nets.norm import GroupNorm
from imagen_jax.nets.remat import remat
from imagen_jax.typing import (
  Array,
  AugLevel,
  Image,
  LogSNR,
  TextEmb,
  TextMask,
)


class UNet(Network):
  """The 64×64 text-to-image U-Net of F.1; the defaults are the paper's.

  Attributes:
    resolution: side of the training images in pixels; it maps
      `attention_resolutions` to levels. Other sizes work too.
    channels: width of the first level (`embed_dim`).
    channel_mults: width of each level in multiples of `channels`.
    num_res_blocks: residual blocks per level of the encoder; the decoder has
      one more, each with one skip. A number, or one per level.
    attention_resolutions: where attention follows every residual block.
    head_dim: size of an attention head.
    emb_channels: width of the conditioning vector; None is 4 × channels.
    text_width: width to which the text is projected first; None: it is not.
    qk_norm: whether attentions normalise queries and keys, see
      `TextAttention`.
    dropout: rate in the residual blocks.
    norm_groups: groups of every GroupNorm.
    remat: None, or the policy in `nets.remat.POLICIES` with which residual
      blocks and attentions are rematerialised.
    attention: implementation, see `nets.dot_product.attention`.
    out_channels: channels of the prediction.
    dtype: of the activations; parameters are float32.
  """

  resolution: int = 64
  channels: int = 512
  channel_mults: Sequence[int] = (1, 2, 3, 4)
  num_res_blocks: int | Sequence[int] = 3
  attention_resolutions: Sequence[int] = (32, 16, 8)
  head_dim: int = 64
  emb_channels: int | None = None
  text_width: int | None = None
  qk_norm: bool = False
  dropout: float = 0.0
  norm_groups: int = 32
  remat: str | None = None
  attention: str = 'xla'
  out_channels: int = 3
  dtype: DTypeLike = jnp.float32

  @property
  def multiple(self) -> int:
    return 2 ** (len(self.channel_mults) - 1)

  @nn.compact
  def __call__(
    self,
    z: Image,
    logsnr: LogSNR,
    text: TextEmb,
    mask: TextMask,
    low_res: Image | None = None,
    aug_level: AugLevel | None = None,
    train: bool = False,
  ) -> Float[Array, 'b h w {self.out_channels}']:
    """Predicts eps, v or x, whichever it was trained for.

    Args:
      z: [B, H, W, 3] noisy images; H and W divisible by 2^(levels − 1).
      logsnr: [B] their log-SNR.
      text: [B, L, D] text embeddings.
      mask: [B, L] bool, True at real tokens.
      low_res: [B, H, W, 3] upsampled low-resolution images, or None.
      aug_level: [B] in [0, 1], their noise augmentation, with `low_res` only.
      train: whether dropout is on (needs the 'dropout' rng).

    Returns:
      [B, H, W, out_channels] float32.
    """
    levels = len(self.channel_mults)
    blocks = self.num_res_blocks
    blocks = (blocks,) * levels if isinstance(blocks, int) else tuple(blocks)
    widths = [self.channels * mult for mult in self.channel_mults]
    text = text.astype(self.dtype)
    if self.text_width is not None:
      text = Dense(self.text_width, dtype=self.dtype, name='text_in')(text)
    emb = Conditioning(
      self.emb_channels or 4 * self.channels,
      sinusoid=self.channels,
      pool_head_dim=self.head_dim,
      dtype=self.dtype,
      name='conditioning',
    )(logsnr, text, mask, aug_level)

    block = functools.partial(
      remat(ResBlock, self.remat, static=(3,)),
      dropout=self.dropout,
      norm_groups=self.norm_groups,
      dtype=self.dtype,
    )
    attention = functools.partial(
      remat(TextAttention, self.remat),
      self.head_dim,
      norm_groups=self.norm_groups,
      implementation=self.attention,
      qk_norm=self.qk_norm,
      dtype=self.dtype,
    )

    def res(
      h: Float[Array, 'b h w c'],
      width: int,
      name: str,
      resample: str | None = None,
    ) -> Float[Array, 'b h2 w2 {width}']:
      return block(width, resample=resample, name=name)(h, emb, train)

    def attend(
      h: Float[Array, 'b h w c'], level: int, name: str
    ) -> Float[Array, 'b h w c']:
      if self.resolution >> level not in self.attention_resolutions:
        return h
      return attention(name=name)(h, text, mask)

    h = z if low_res is None else jnp.concatenate([z, low_res], axis=-1)
    h = conv_in(h, self.channels, self.dtype)
    skips = [h]
    for level, width in enumerate(widths):
      for i in range(blocks[level]):
        h = res(h, width, f'down_{level}_res_{i}')
        h = attend(h, level, f'down_{level}_attn_{i}')
        skips.append(h)
      if level < levels - 1:
        h = res(h, width, f'down_{level}_resample', 'down')
        skips.append(h)

    h = res(h, widths[-1], 'mid_res_0')
    h = attention(name='mid_attn')(h, text, mask)
    h = res(h, widths[-1], 'mid_res_1')

    for level, width in reversed(list(enumerate(widths))):
      for i in range(blocks[level] + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = res(h, width, f'up_{level}_res_{i}')
        h = attend(h, level, f'up_{level}_attn_{i}')
      if level:
        h = res(h, width, f'up_{level}_resample', 'up')

    h = GroupNorm(self.norm_groups, dtype=self.dtype, name='norm_out')(h)
    return conv(
      self.out_channels, zero=True, dtype=jnp.float32, name='conv_out'
    )(nn.swish(h).astype(jnp.float32))
