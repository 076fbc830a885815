"""T5Gemma's encoder (Zhang et al. 2025): Gemma 2's layers, attending both ways.

Its layers alternate between attention to all tokens and to a window of them,
which is longer than any caption here.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from imagen_jax.nets.dot_product import Logits
from imagen_jax.nets.tower import ACTIVATIONS, Tower
from imagen_jax.typing import Array, TextEmb, TextMask

SIZES: dict[str, dict[str, int]] = {'t5gemma-2b': {}}  # the defaults


def rotate(x: Float[Array, 'b l h s'], theta: float) -> Float[Array, 'b l h s']:
  """Rotary position embedding (Su et al. 2021), of halves of each head."""
  half = x.shape[-1] // 2
  frequencies = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
  angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class _Gemma(Tower):
  """Attributes as in Hugging Face's config.

  Attributes:
    num_key_value_heads: each serves several heads of the query.
    head_dim: size of a head.
    query_pre_attn_scalar: logits are divided by its square root.
    rope_theta: base of the rotary embedding's frequencies.
    attn_logit_softcapping: logits are squashed to ± this.
  """

  hidden_size: int = 2304
  intermediate_size: int = 9216
  num_attention_heads: int = 8
  num_hidden_layers: int = 26
  hidden_act: str = 'gelu_pytorch_tanh'
  layer_norm_eps: float = 1e-6
  num_key_value_heads: int = 4
  head_dim: int = 256
  query_pre_attn_scalar: int = 256
  rope_theta: float = 10000.0
  attn_logit_softcapping: float = 50.0

  def norm(self, name: str, x: Array) -> jax.Array:
    """x / rms(x) · (1 + scale)."""
    square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    y: Any = x * jax.lax.rsqrt(square + self.layer_norm_eps)
    return y * (1 + self.tensor(f'{name}.weight', x.shape[-1]))


class T5GemmaLayer(_Gemma):
  """One layer, with norms before and after each sublayer."""

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b l d'], mask: TextMask
  ) -> tuple[Float[Array, 'b l d'], None]:
    h = self.norm('pre_self_attn_layernorm', x)
    h = self.grouped_attention('self_attn', h, mask)
    x = x + self.norm('post_self_attn_layernorm', h)
    h = self.norm('pre_feedforward_layernorm', x)
    width = self.intermediate_size
    gate = self.linear('mlp.gate_proj', h, width, bias=False)
    gate = ACTIVATIONS[self.hidden_act](gate)
    h = gate * self.linear('mlp.up_proj', h, width, bias=False)
    h = self.linear('mlp.down_proj', h, self.hidden_size, bias=False)
    return x + self.norm('post_feedforward_layernorm', h), None

  def grouped_attention(
    self, name: str, x: Float[Array, 'b l d'], mask: TextMask
  ) -> Float[jax.Array, 'b l d']:
    """Attention whose heads share keys and values in groups."""

    def project(part: str, heads: int) -> Float[Array, 'b l {heads} s']:
      size = heads * self.head_dim
      y = self.linear(f'{name}.{part}_proj', x, size, bias=False)
      return y.reshape(*x.shape[:2], heads, self.head_dim)

    heads, shared = self.num_attention_heads, self.num_key_value_heads
    q, k = project('q', heads), project('k', shared)
    q, k = (rotate(y, self.rope_theta).astype(self.dtype) for y in (q, k))
    v = project('v', shared).astype(self.dtype)
    k, v = (jnp.repeat(y, heads // shared, axis=2) for y in (k, v))
    scale, cap = self.query_pre_attn_scalar**-0.5, self.attn_logit_softcapping
    h = self.attend(q, k, v, mask, Logits(scale, cap))
    return self.linear(f'{name}.o_proj', h, self.hidden_size, bias=False)


class T5Gemma(_Gemma):
  """Token ids to contextual embeddings; the defaults are the 2B encoder's.

  Attributes:
    vocab_size: rows of the embedding table.
    max_position_embeddings: the most tokens of a caption, the window's size.
  """

  vocab_size: int = 256000
  max_position_embeddings: int = 4096
  PREFIX = 'encoder.layers'

  @nn.compact
  def __call__(self, ids: Int[Array, 'b l'], mask: TextMask) -> TextEmb:
    """Contextual embeddings of captions, after the final norm.

    Args:
      ids: [B, L] int32 tokens, each < vocab_size.
      mask: [B, L] bool, False at padding.

    Returns:
      [B, L, D] float32, exact zeros at padding.
    """
    x = self.embed('encoder.embed_tokens', ids, self.vocab_size)
    x = self.stack(T5GemmaLayer, x * self.hidden_size**0.5, mask)
    return jnp.where(mask[..., None], self.norm('encoder.norm', x), 0)
