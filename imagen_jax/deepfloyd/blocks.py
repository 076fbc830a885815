"""The parts of DeepFloyd IF's U-Net, with diffusers' names.

BigGAN residual blocks with scale-shift conditioning, joint attention over text
and pixels, and the embeddings of the step and of the pooled text.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from imagen_jax.deepfloyd.config import UNetConfig
from imagen_jax.nets.dense import Dense
from imagen_jax.nets.dot_product import attention
from imagen_jax.nets.layers import RESAMPLE, conv
from imagen_jax.nets.norm import GroupNorm, LayerNorm
from imagen_jax.typing import Array, Image, TextEmb

TEXT_GROUPS = 32  # diffusers' `cross_attention_norm_num_groups`
NORM_EPS = 1e-5  # of the norms that do not use `norm_eps`

Emb = Float[Array, 'b e']  # vectors
Features = Float[Array, 'b _ _ _']  # of any level
Steps = Float[Array, ' b'] | Int[Array, ' b']


def activation(name: str | None) -> Callable[[Array], Array]:
  """'gelu' (exact, with erf) or 'silu'; None is the identity."""
  functions: dict[str | None, Callable] = {
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'silu': jax.nn.silu,
    None: lambda x: x,
  }
  return functions[name]


def timestep_features(
  t: Steps,
  dim: int,
  *,
  flip_sin_to_cos: bool = True,
  freq_shift: float = 0,
) -> Float[Array, 'b {dim}']:
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
  dtype: DTypeLike

  @nn.compact
  def __call__(self, t: Steps) -> Emb:
    """[B] -> [B, E]."""
    h = timestep_features(
      t,
      self.config.block_out_channels[0],
      flip_sin_to_cos=self.config.flip_sin_to_cos,
      freq_shift=self.config.freq_shift,
    ).astype(self.dtype)
    dense = functools.partial(Dense, self.config.emb_channels, dtype=self.dtype)
    h = activation(self.config.act_fn)(dense(name='linear_1')(h))
    return dense(name='linear_2')(h)


class AttentionPool(nn.Module):
  """Attention pooling; the query is the mean token plus a learned vector.

  Keys and values are that query token and all tokens.
  """

  num_heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, text: TextEmb) -> Emb:
    """[B, L, D] -> [B, D]."""
    width = text.shape[-1]
    position = self.param(
      'positional_embedding', nn.initializers.normal(width**-0.5), (1, width)
    )
    mean = jnp.mean(text, axis=1, keepdims=True)
    mean = (mean + position[None]).astype(self.dtype)
    text = jnp.concatenate([mean, text], axis=1)

    def heads(name: str, x: Array) -> Array:
      x = Dense(width, dtype=self.dtype, name=name)(x)
      return x.reshape(*x.shape[:2], self.num_heads, -1)

    out = attention(
      heads('q_proj', mean), heads('k_proj', text), heads('v_proj', text)
    )
    return out.reshape(out.shape[0], width)


class TextEmbedding(nn.Module):
  """The pooled text that is added to the time embedding."""

  config: UNetConfig
  dtype: DTypeLike

  @nn.compact
  def __call__(self, text: TextEmb) -> Emb:
    """[B, L, D] from the text encoder -> [B, E]."""
    norm = functools.partial(LayerNorm, epsilon=NORM_EPS, dtype=self.dtype)
    h = norm(name='norm1')(text)
    h = AttentionPool(
      self.config.addition_embed_type_num_heads, self.dtype, name='pool'
    )(h)
    h = Dense(self.config.emb_channels, dtype=self.dtype, name='proj')(h)
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
  dtype: DTypeLike
  resample: str | None = None

  @nn.compact
  def __call__(self, x: Features, emb: Emb) -> Features:
    """x [B, H, W, C], emb [B, E] -> [B, H', W', features]."""
    act = activation(self.config.act_fn)
    norm = functools.partial(
      GroupNorm,
      self.config.norm_num_groups,
      dtype=self.dtype,
      epsilon=self.config.norm_eps,
    )
    resample = RESAMPLE[self.resample]
    h = resample(act(norm(name='norm1')(x)))
    h = conv(self.features, dtype=self.dtype, name='conv1')(h)
    if not self.config.resnet_skip_time_act:
      emb = act(emb)
    film = Dense(2 * self.features, dtype=self.dtype, name='time_emb_proj')
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
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Image, text: TextEmb) -> Image:
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

    def heads(name: str, x: Array) -> Array:
      x = Dense(channels, dtype=self.dtype, name=name)(x)
      return x.reshape(batch, x.shape[1], -1, self.head_dim)

    key, value = heads('add_k_proj', text), heads('add_v_proj', text)
    if not self.only_text:
      key = jnp.concatenate([key, heads('to_k', h)], axis=1)
      value = jnp.concatenate([value, heads('to_v', h)], axis=1)
    out = attention(heads('to_q', h), key, value)
    out = Dense(channels, dtype=self.dtype, name='to_out_0')(
      out.reshape(batch, height * width, channels)
    )
    return x + out.reshape(x.shape)
