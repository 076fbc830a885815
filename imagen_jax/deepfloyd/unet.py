"""DeepFloyd IF's U-Net, an Imagen with public weights.

The structure is that of this project's U-Nets; `UNetConfig` covers the
differences. Modules have diffusers' names, so `weights.py` maps parameters by
string rules.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from imagen_jax.deepfloyd.blocks import (
  AddedKVAttention,
  Emb,
  Features,
  ResnetBlock,
  StepEmbedding,
  Steps,
  TextEmbedding,
  activation,
)
from imagen_jax.deepfloyd.config import UNetConfig
from imagen_jax.nets.dense import Dense
from imagen_jax.nets.layers import conv
from imagen_jax.nets.norm import GroupNorm
from imagen_jax.typing import Array, Image, TextEmb


class _Level(nn.Module):
  """Residual blocks and attention of one level, with diffusers' names."""

  config: UNetConfig
  level: int  # index of the block, in execution order
  features: int
  only_text: bool
  attend: bool
  scale: float  # divides the residual blocks' sums
  dtype: DTypeLike

  def block(self, name: str, resample: str | None = None) -> ResnetBlock:
    return ResnetBlock(
      self.config,
      self.features,
      self.scale,
      self.dtype,
      resample,
      name=name,
    )

  def step(self, j: int, h: Features, emb: Emb, text: TextEmb) -> Features:
    """The j-th residual block and its attention."""
    h = self.block(f'resnets_{j}')(h, emb)
    if not self.attend:
      return h
    return AddedKVAttention(
      self.config,
      # diffusers does not reverse this list in the decoder either.
      self.config.attention_head_dim[self.level],
      self.only_text,
      self.dtype,
      name=f'attentions_{j}',
    )(h, text)


class DownLevel(_Level):
  """One encoder level; every output is also a skip connection."""

  @nn.compact
  def __call__(
    self, h: Features, emb: Emb, text: TextEmb
  ) -> tuple[Features, list[Features]]:
    """-> (h, [skips])."""
    skips = []
    for j in range(self.config.layers_per_block[self.level]):
      h = self.step(j, h, emb, text)
      skips.append(h)
    if self.level < len(self.config.block_out_channels) - 1:
      h = self.block('downsamplers_0', 'down')(h, emb)
      skips.append(h)
    return h, skips


class UpLevel(_Level):
  """One decoder level, which consumes the most recent skips."""

  @nn.compact
  def __call__(
    self, h: Features, skips: Sequence[Features], emb: Emb, text: TextEmb
  ) -> Features:
    """-> h; `skips` are those of this level, in order of use."""
    for j, skip in enumerate(skips):
      h = self.step(j, jnp.concatenate([h, skip], axis=-1), emb, text)
    if self.level < len(self.config.block_out_channels) - 1:
      h = self.block('upsamplers_0', 'up')(h, emb)
    return h


class MidLevel(_Level):
  """Residual block, attention, residual block at the lowest resolution."""

  @nn.compact
  def __call__(self, h: Features, emb: Emb, text: TextEmb) -> Features:
    """-> h."""
    h = self.step(0, h, emb, text)
    return self.block('resnets_1')(h, emb)


class IFUNet(nn.Module):
  """The U-Net of any IF stage.

  Attributes:
    config: `UNetConfig`.
    dtype: activations' type; norms, softmaxes and the result are float32.
  """

  config: UNetConfig
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    sample: Image,
    t: Steps,
    text: TextEmb,
    noise_level: Steps | None = None,
    pooled_text: TextEmb | None = None,
  ) -> Float[Array, 'b h w out']:
    """Predicts eps and, with 6 output channels, the variance's interpolation.

    Args:
      sample: [B, H, W, in_channels]: the noisy image and, in a
        super-resolution stage, the upsampled and noised low-resolution one.
        H and W are multiples of `config.multiple`.
      t: [B] step numbers, 0 to 999.
      text: [B, L, encoder_hid_dim]; every position is attended to, padding too.
      noise_level: [B] step numbers of the low-resolution image's noise.
      pooled_text: [B, L, encoder_hid_dim], another text for the pooled vector
        (a style); None: `text`.

    Returns:
      [B, H, W, out_channels] float32.
    """
    config, dtype = self.config, self.dtype
    text = text.astype(dtype)
    pooled_text = text if pooled_text is None else pooled_text.astype(dtype)
    emb = StepEmbedding(config, dtype, name='time_embedding')(t)
    if config.class_embed_type == 'timestep':
      if noise_level is None:
        raise ValueError('a super-resolution stage needs its noise_level')
      noise = StepEmbedding(config, dtype, name='class_embedding')(noise_level)
      emb = emb + noise
    emb = emb + TextEmbedding(config, dtype, name='add_embedding')(pooled_text)
    emb = activation(config.time_embedding_act_fn)(emb)
    if config.encoder_hid_dim is not None:
      text = Dense(
        config.cross_attention_dim, dtype=dtype, name='encoder_hid_proj'
      )(text)

    channels, only_text = config.block_out_channels, config.only_cross_attention
    scale = config.resnet_out_scale_factor
    h = sample.astype(dtype)
    h = conv(channels[0], dtype=dtype, name='conv_in')(h)
    skips = [h]
    for i, attend in enumerate(config.down_attention):
      level = config, i, channels[i], only_text[i], attend
      down = DownLevel(*level, scale, dtype, name=f'down_blocks_{i}')
      h, outputs = down(h, emb, text)
      skips += outputs
    h = MidLevel(
      config,
      -1,
      channels[-1],
      config.mid_block_only_cross_attention,
      attend=True,
      scale=config.mid_block_scale_factor,
      dtype=dtype,
      name='mid_block',
    )(h, emb, text)
    for i, attend in enumerate(config.up_attention):
      below = len(channels) - 1 - i
      level = config, i, channels[below], only_text[below], attend
      up = UpLevel(*level, scale, dtype, name=f'up_blocks_{i}')
      own = [skips.pop() for _ in range(config.layers_per_block[below] + 1)]
      h = up(h, own, emb, text)

    h = GroupNorm(
      config.norm_num_groups,
      dtype=jnp.float32,
      epsilon=config.norm_eps,
      name='conv_norm_out',
    )(h)
    h = activation(config.act_fn)(h).astype(dtype)
    h = conv(config.out_channels, dtype=dtype, name='conv_out')(h)
    return h.astype(jnp.float32)
