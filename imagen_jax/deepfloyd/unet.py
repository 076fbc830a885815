"""DeepFloyd IF's U-Net, an Imagen with public weights.

The structure is that of this project's U-Nets: BigGAN residual blocks with
scale-shift conditioning, joint attention over text and pixels, and an
attention-pooled text vector added to the time embedding. `UNetConfig` covers
the differences. Modules have diffusers' names, so `weights.py` maps parameters
by string rules.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.deepfloyd.config import UNetConfig
from imagen_jax.nets.attention import attention
from imagen_jax.nets.layers import conv, downsample, upsample
from imagen_jax.nets.norm import GroupNorm

TEXT_GROUPS = 32  # diffusers' `cross_attention_norm_num_groups`
NORM_EPS = 1e-5  # of the norms that do not use `norm_eps`


def activation(name):
  """'gelu' (exact, with erf) or 'silu'; None is the identity."""
  return {
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'silu': jax.nn.silu,
    None: lambda x: x,
  }[name]


def timestep_features(t, dim, *, flip_sin_to_cos=True, freq_shift=0):
  """Sinusoidal features of a step number: [B] -> [B, dim], float32.

  Frequencies decrease geometrically from 1 to 1/10000 over dim/2 − freq_shift
  steps. Always float32: in bfloat16 the cosine of a step near 1000 would be
  wrong by more than 1.
  """
  half = dim // 2
  exponents = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
  angles = t.astype(jnp.float32)[:, None] * jnp.exp(
    -math.log(10000.0) * exponents
  )
  parts = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class StepEmbedding(nn.Module):
  """Two dense layers over the sinusoidal features of a step number."""

  config: UNetConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, t):
    """[B] -> [B, E]."""
    h = timestep_features(
      t,
      self.config.block_out_channels[0],
      flip_sin_to_cos=self.config.flip_sin_to_cos,
      freq_shift=self.config.freq_shift,
    ).astype(self.dtype)
    dense = functools.partial(
      nn.Dense, self.config.emb_channels, dtype=self.dtype
    )
    h = activation(self.config.act_fn)(dense(name='linear_1')(h))
    return dense(name='linear_2')(h)


class AttentionPool(nn.Module):
  """Attention pooling; the query is the mean token plus a learned vector.

  Keys and values are that query token and all tokens.
  """

  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, text):
    """[B, L, D] -> [B, D]."""
    width = text.shape[-1]
    position = self.param(
      'positional_embedding', nn.initializers.normal(width**-0.5), (1, width)
    )
    mean = jnp.mean(text, axis=1, keepdims=True)
    mean = mean + position.astype(self.dtype)[None]
    text = jnp.concatenate([mean, text], axis=1)

    def heads(name, x):
      x = nn.Dense(width, dtype=self.dtype, name=name)(x)
      return x.reshape(*x.shape[:2], self.num_heads, -1)

    out = attention(
      heads('q_proj', mean), heads('k_proj', text), heads('v_proj', text)
    )
    return out.reshape(out.shape[0], width)


class TextEmbedding(nn.Module):
  """The pooled text that is added to the time embedding."""

  config: UNetConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, text):
    """[B, L, D] from the text encoder -> [B, E]."""
    norm = functools.partial(
      nn.LayerNorm,
      epsilon=NORM_EPS,
      use_fast_variance=False,
      dtype=self.dtype,
    )
    h = norm(name='norm1')(text)
    h = AttentionPool(
      self.config.addition_embed_type_num_heads, self.dtype, name='pool'
    )(h)
    h = nn.Dense(self.config.emb_channels, dtype=self.dtype, name='proj')(h)
    return norm(name='norm2')(h)


class ResnetBlock(nn.Module):
  """A residual block, optionally halving or doubling the resolution.

  Attributes:
    features: output channels.
    scale: divides the sum (diffusers' output_scale_factor).
    resample: None, 'down' or 'up'.
  """

  config: UNetConfig
  features: int
  scale: float
  dtype: jnp.dtype
  resample: str | None = None

  @nn.compact
  def __call__(self, x, emb):
    """x [B, H, W, C], emb [B, E] -> [B, H', W', features]."""
    act = activation(self.config.act_fn)
    norm = functools.partial(
      GroupNorm,
      self.config.norm_num_groups,
      dtype=self.dtype,
      epsilon=self.config.norm_eps,
    )
    resample = {None: lambda h: h, 'down': downsample, 'up': upsample}[
      self.resample
    ]
    h = resample(act(norm(name='norm1')(x)))
    h = conv(self.features, dtype=self.dtype, name='conv1')(h)
    if not self.config.resnet_skip_time_act:
      emb = act(emb)
    film = nn.Dense(2 * self.features, dtype=self.dtype, name='time_emb_proj')
    scale, shift = jnp.split(film(emb)[:, None, None, :], 2, axis=-1)
    h = act(norm(name='norm2')(h) * (1 + scale) + shift)
    h = conv(self.features, dtype=self.dtype, name='conv2')(h)
    x = resample(x)
    if x.shape[-1] != self.features:
      shortcut = conv(
        self.features, kernel=1, dtype=self.dtype, name='conv_shortcut'
      )
      x = shortcut(x)
    return (x + h) / jnp.asarray(self.scale, h.dtype)


class AddedKVAttention(nn.Module):
  """Pixels attend to [text; pixels], or to the text alone, in one softmax.

  IF normalises the projected text with a GroupNorm, not a LayerNorm: its
  statistics are over all tokens of a prompt together.

  Attributes:
    head_dim: size of a head.
    only_text: diffusers' only_cross_attention.
  """

  config: UNetConfig
  head_dim: int
  only_text: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, text):
    """x [B, H, W, C], text [B, L, D] -> [B, H, W, C]."""
    batch, height, width, channels = x.shape
    h = GroupNorm(
      self.config.norm_num_groups,
      dtype=self.dtype,
      epsilon=NORM_EPS,
      name='group_norm',
    )(x).reshape(batch, height * width, channels)
    if self.config.cross_attention_norm:
      norm = GroupNorm(
        TEXT_GROUPS, dtype=self.dtype, epsilon=NORM_EPS, name='norm_cross'
      )
      text = norm(text[:, :, None])[:, :, 0]

    def heads(name, x):
      x = nn.Dense(channels, dtype=self.dtype, name=name)(x)
      return x.reshape(batch, x.shape[1], -1, self.head_dim)

    key, value = heads('add_k_proj', text), heads('add_v_proj', text)
    if not self.only_text:
      key = jnp.concatenate([key, heads('to_k', h)], axis=1)
      value = jnp.concatenate([value, heads('to_v', h)], axis=1)
    out = attention(heads('to_q', h), key, value)
    out = nn.Dense(channels, dtype=self.dtype, name='to_out_0')(
      out.reshape(batch, height * width, channels)
    )
    return x + out.reshape(x.shape)


class _Level(nn.Module):
  """Residual blocks and attention of one level, with diffusers' names."""

  config: UNetConfig
  level: int  # index of the block, in execution order
  features: int
  only_text: bool
  attend: bool
  dtype: jnp.dtype

  def block(self, name, resample=None):
    return ResnetBlock(
      self.config,
      self.features,
      self.config.resnet_out_scale_factor,
      self.dtype,
      resample,
      name=name,
    )

  def step(self, j, h, emb, text):
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
  def __call__(self, h, emb, text):
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
  def __call__(self, h, skips, emb, text):
    """-> h; `skips` are those of this level, in order of use."""
    for j, skip in enumerate(skips):
      h = self.step(j, jnp.concatenate([h, skip], axis=-1), emb, text)
    if self.level < len(self.config.block_out_channels) - 1:
      h = self.block('upsamplers_0', 'up')(h, emb)
    return h


class MidLevel(nn.Module):
  """Residual block, attention, residual block at the lowest resolution."""

  config: UNetConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, h, emb, text):
    """-> h."""
    block = functools.partial(
      ResnetBlock,
      self.config,
      self.config.block_out_channels[-1],
      self.config.mid_block_scale_factor,
      self.dtype,
    )
    h = block(name='resnets_0')(h, emb)
    h = AddedKVAttention(
      self.config,
      self.config.attention_head_dim[-1],
      self.config.mid_block_only_cross_attention,
      self.dtype,
      name='attentions_0',
    )(h, text)
    return block(name='resnets_1')(h, emb)


class IFUNet(nn.Module):
  """The U-Net of any IF stage.

  Attributes:
    config: `UNetConfig`.
    dtype: activations' type; norms, softmaxes and the result are float32.
  """

  config: UNetConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, sample, t, text, noise_level=None, pooled_text=None):
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
      noise = StepEmbedding(config, dtype, name='class_embedding')(noise_level)
      emb = emb + noise
    emb = emb + TextEmbedding(config, dtype, name='add_embedding')(pooled_text)
    emb = activation(config.time_embedding_act_fn)(emb)
    if config.encoder_hid_dim is not None:
      text = nn.Dense(
        config.cross_attention_dim, dtype=dtype, name='encoder_hid_proj'
      )(text)

    channels, levels = config.block_out_channels, len(config.block_out_channels)
    h = sample.astype(dtype)
    h = conv(channels[0], dtype=dtype, name='conv_in')(h)
    skips = [h]
    for i in range(levels):
      h, outputs = DownLevel(
        config,
        i,
        channels[i],
        config.only_cross_attention[i],
        config.down_attention[i],
        dtype,
        name=f'down_blocks_{i}',
      )(h, emb, text)
      skips += outputs
    h = MidLevel(config, dtype, name='mid_block')(h, emb, text)
    for i in range(levels):
      below = levels - 1 - i
      count = config.layers_per_block[below] + 1
      h = UpLevel(
        config,
        i,
        channels[below],
        config.only_cross_attention[below],
        config.up_attention[i],
        dtype,
        name=f'up_blocks_{i}',
      )(h, [skips.pop() for _ in range(count)], emb, text)

    h = GroupNorm(
      config.norm_num_groups,
      dtype=jnp.float32,
      epsilon=config.norm_eps,
      name='conv_norm_out',
    )(h)
    h = activation(config.act_fn)(h).astype(dtype)
    h = conv(config.out_channels, dtype=dtype, name='conv_out')(h)
    return h.astype(jnp.float32)
