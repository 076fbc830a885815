"""The text attention of the U-Nets.

Imagen's U-Nets are conditioned on the text twice (Section 2.5, Appendix
D.3.1): by attention to the token sequence, where "the text embedding sequence
is concatenated to the key-value pairs of each self-attention layer", and by a
pooled vector added to the time embedding. Both apply LayerNorm to the text.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from imagen_jax.nets.dense import DenseGeneral
from imagen_jax.nets.dot_product import attention
from imagen_jax.nets.norm import GroupNorm, LayerNorm
from imagen_jax.typing import Array, TextEmb, TextMask


class TextAttention(nn.Module):
  """Attention from pixels to [text; pixels], added to its input (D.3.1).

  With `self_attention` one softmax covers the keys of text and pixels (base
  and 64→256 models). Without it pixels attend to the text alone (the 256→1024
  model, where the quadratic cost of self-attention is too high).

  Attributes:
    head_dim: size of a head; the base model uses 64. Ignored when `num_heads`
      is given.
    num_heads: number of heads; the Efficient U-Net uses 8.
    inner: total width of the heads; None is the width of the input. The
      Efficient U-Net uses twice its channels (Figure A.28).
    self_attention: whether pixels attend to pixels.
    text: whether pixels attend to the text.
    qk_norm: divide each head's queries and keys by their RMS, and scale them by
      learned factors: without these no logit exceeds √size, whatever the
      kernels grow to (after Dehghani et al. 2023; not in the paper).
    norm_groups: groups of the input's GroupNorm.
    implementation: see `attention`.
    dtype: computation type of the projections.
  """

  head_dim: int = 64
  num_heads: int | None = None
  inner: int | None = None
  self_attention: bool = True
  text: bool = True
  qk_norm: bool = False
  norm_groups: int = 32
  implementation: str = 'xla'
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w c'], text: TextEmb, mask: TextMask
  ) -> Float[Array, 'b h w c']:
    """x plus the result of the attention."""
    batch, height, width, channels = x.shape
    inner = self.inner or channels
    heads = self.num_heads or inner // self.head_dim
    if inner % heads:
      raise ValueError(f'{inner} channels do not split into {heads} heads')
    dense = functools.partial(
      DenseGeneral, features=(heads, inner // heads), dtype=self.dtype
    )

    def project(name: str, x: Float[Array, 'b l c']) -> Any:
      """Queries or keys [B, L, N, H]."""
      projected = dense(name=name)(x)
      if not self.qk_norm:
        return projected
      return nn.RMSNorm(dtype=self.dtype, name=f'{name}_norm')(projected)

    h = GroupNorm(self.norm_groups, dtype=self.dtype, name='norm')(x)
    h = h.reshape(batch, height * width, channels)
    keys: list[jax.Array] = []
    values: list[jax.Array] = []
    masks: list[Array] = []
    if self.text:
      t = LayerNorm(dtype=self.dtype, name='text_norm')(text)
      keys.append(project('text_key', t))
      values.append(dense(name='text_value')(t))
      masks.append(mask)
    if self.self_attention:
      keys.append(project('key', h))
      values.append(dense(name='value')(h))
      masks.append(jnp.ones((batch, height * width), bool))
    out = attention(
      project('query', h),
      jnp.concatenate(keys, axis=1),
      jnp.concatenate(values, axis=1),
      jnp.concatenate(masks, axis=1),
      implementation=self.implementation,
    )
    # Zero-initialised, so that the block starts as the identity.
    out = DenseGeneral(
      channels,
      axis=(-2, -1),
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
      name='out',
    )(out)
    return x + out.reshape(x.shape).astype(x.dtype)


class TextPool(nn.Module):
  """The attention-pooled text vector added to the time embedding (2.5, F.1).

  One query, the mean of the caption's normalised tokens plus a learned vector,
  attends to all of them. A caption with every position masked gives exact
  zeros, the null condition of classifier-free guidance.

  Attributes:
    features: width of the result.
    head_dim: size of a head.
    inner: total width of the heads; None is the width of the text.
    implementation: see `attention`.
    dtype: computation type of the projections.
  """

  features: int
  head_dim: int = 64
  inner: int | None = None
  implementation: str = 'xla'
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, text: TextEmb, mask: TextMask
  ) -> Float[Array, 'b {self.features}']:
    """Pools the tokens where the mask is True into one vector."""
    inner = self.inner or text.shape[-1]
    heads = max(1, inner // self.head_dim)
    dense = functools.partial(
      DenseGeneral, features=(heads, inner // heads), dtype=self.dtype
    )
    t = LayerNorm(dtype=self.dtype, name='norm')(text)
    seen = mask[..., None].astype(t.dtype)
    mean = jnp.sum(t * seen, axis=1) / jnp.maximum(jnp.sum(seen, axis=1), 1)
    query = self.param('query', nn.initializers.normal(0.02), (text.shape[-1],))
    pooled = attention(
      dense(name='to_query')((mean + query)[:, None]),
      dense(name='key')(t),
      dense(name='value')(t),
      mask,
      implementation=self.implementation,
    )[:, 0]
    out = DenseGeneral(
      self.features, axis=(-2, -1), dtype=self.dtype, name='out'
    )(pooled)
    out = LayerNorm(dtype=self.dtype, name='out_norm')(out)
    return jnp.where(jnp.any(mask, axis=-1, keepdims=True), out, 0)
