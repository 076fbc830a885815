"""The super-resolution models' Efficient U-Net (Appendix B.1, F.2, F.3).

It differs from the base U-Net in three ways: most residual blocks are at the
low resolutions, where they are cheap; residual sums are divided by √2; a block
downsamples before its convolutions and upsamples after them. What happens at
the full resolution is reduced to the first convolution, whose features join the
last block's (Figure A.30 has a block there): without them the network cannot
tell the pixels of a 2×2 block apart, and eps at high noise is z. The residual
blocks of a level have equal shapes and are one `nn.scan` over stacked
parameters, which keeps compilation short.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
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
  upsample,
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


class _Step(nn.Module):
  """One residual block of a scan, in the decoder with one skip as input.

  In the encoder its result is also a skip.
  """

  block: Callable[..., nn.Module]

  @nn.compact
  def __call__(
    self,
    h: Float[Array, 'b h w c'],
    skip: Float[Array, 'b h w skip'] | None,
    emb: Float[Array, 'b e'],
    train: bool,
  ) -> tuple[Float[Array, 'b h w out'], Float[Array, 'b h w out'] | None]:
    if skip is not None:
      h = jnp.concatenate([h, skip], axis=-1)
    h = self.block(name='res')(h, emb, train)
    return h, h if skip is None else None


class EfficientUNet(Network):
  """The super-resolution U-Net; the defaults are the 64→256 model's (F.2).

  Every sequence has one entry per block, the highest resolution first.

  Attributes:
    channels: width of each block.
    num_res_blocks: residual blocks in each block, of the encoder and of the
      decoder alike.
    strides: 2 where a block starts by halving the resolution, else 1.
    self_attention: whether the attention at a block's end is over pixels.
    text_attention: whether it is over the text; with neither there is none.
    num_heads: heads of the attention, whose width is twice the block's.
    emb_channels: width of the conditioning vector.
    text_width: width to which the text is projected first; None: it is not.
    conv_shortcut: see `ResBlock`.
    qk_norm: whether attentions normalise queries and keys, see
      `TextAttention`.
    dropout: rate in the residual blocks.
    norm_groups: groups of every GroupNorm.
    remat: None, or the policy in `nets.remat.POLICIES` with which residual
      blocks and attentions are rematerialised.
    unroll: whether the scans are unrolled. None: on CPU only, where XLA's
      gradient of a convolution inside a rolled loop is 17–30 times slower
      than outside. The parameters are the same.
    attention: implementation, see `nets.dot_product.attention`.
    out_channels: channels of the prediction.
    dtype: of the activations; parameters are float32.
  """

  channels: Sequence[int] = (128, 256, 512, 1024)
  num_res_blocks: Sequence[int] = (2, 4, 8, 8)
  strides: Sequence[int] = (2, 2, 2, 2)
  self_attention: Sequence[bool] = (False, False, False, True)
  text_attention: Sequence[bool] = (False, False, False, True)
  num_heads: int = 8
  emb_channels: int = 512
  text_width: int | None = None
  conv_shortcut: bool = False
  qk_norm: bool = False
  dropout: float = 0.0
  norm_groups: int = 32
  remat: str | None = None
  unroll: bool | None = None
  attention: str = 'xla'
  out_channels: int = 3
  dtype: DTypeLike = jnp.float32

  @property
  def multiple(self) -> int:
    return math.prod(self.strides)

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
    """Predicts eps, v or x; arguments and result as `UNet.__call__`.

    H and W are any multiple of the product of the strides: a model without
    self-attention trains on crops and runs on whole images unchanged.
    """
    text = text.astype(self.dtype)
    if self.text_width is not None:
      text = Dense(self.text_width, dtype=self.dtype, name='text_in')(text)
    emb = Conditioning(
      self.emb_channels,
      sinusoid=self.channels[0],
      dtype=self.dtype,
      name='conditioning',
    )(logsnr, text, mask, aug_level)
    unroll = self.unroll
    if unroll is None:
      unroll = jax.default_backend() == 'cpu'

    def run(
      h: Float[Array, 'b h w c'],
      skips: Float[Array, 'n b h w skip'] | None,
      b: int,
      name: str,
    ) -> tuple[Float[Array, 'b h w out'], Float[Array, 'n b h w out'] | None]:
      """`num_res_blocks[b]` equal residual blocks as one scan."""
      length = self.num_res_blocks[b]
      block = functools.partial(
        remat(ResBlock, self.remat, static=(3,)),
        self.channels[b],
        residual_scale=1 / math.sqrt(2),
        conv_shortcut=self.conv_shortcut,
        dropout=self.dropout,
        norm_groups=self.norm_groups,
        dtype=self.dtype,
      )
      scanned = nn.scan(
        _Step,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=length,
        # At least 2: with unroll=1 jax rolls even a loop of length 1.
        unroll=max(length, 2) if unroll else 1,
      )
      return scanned(block, name=name)(h, skips, emb, train)

    def attend(
      h: Float[Array, 'b h w c'], b: int, name: str
    ) -> Float[Array, 'b h w c']:
      if not (self.self_attention[b] or self.text_attention[b]):
        return h
      return remat(TextAttention, self.remat)(
        num_heads=self.num_heads,
        inner=2 * self.channels[b],
        self_attention=self.self_attention[b],
        text=self.text_attention[b],
        norm_groups=self.norm_groups,
        implementation=self.attention,
        qk_norm=self.qk_norm,
        dtype=self.dtype,
        name=name,
      )(h, text, mask)

    h = z if low_res is None else jnp.concatenate([z, low_res], axis=-1)
    h = conv_in(h, self.channels[0], self.dtype)
    full = h
    skips: list[Any] = []
    for b, width in enumerate(self.channels):
      if self.strides[b] > 1 or h.shape[-1] != width:
        h = conv(
          width,
          strides=self.strides[b],
          dtype=self.dtype,
          name=f'down_{b}_conv',
        )(h)
      h, outputs = run(h, None, b, f'down_{b}')
      skips.append(outputs)
      h = attend(h, b, f'down_{b}_attn')

    for b in reversed(range(len(self.channels))):
      # Skips are used in reverse order.
      h, _ = run(h, skips[b][::-1], b, f'up_{b}')
      h = attend(h, b, f'up_{b}_attn')
      above = self.channels[max(b - 1, 0)]
      if self.strides[b] > 1:
        h = upsample(h)
      if self.strides[b] > 1 or above != self.channels[b]:
        h = conv(above, dtype=self.dtype, name=f'up_{b}_conv')(h)

    h = conv(self.channels[0], kernel=1, dtype=self.dtype, name='join')(
      jnp.concatenate([h, full], axis=-1)
    )
    h = GroupNorm(self.norm_groups, dtype=self.dtype, name='norm_out')(h)
    return conv(
      self.out_channels, zero=True, dtype=jnp.float32, name='conv_out'
    )(nn.swish(h).astype(jnp.float32))
