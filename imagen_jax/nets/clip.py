"""CLIP's text encoder (Radford et al. 2021), of Imagen's ablation (D.1)."""

from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from imagen_jax.nets.dot_product import MASKED, Logits
from imagen_jax.nets.tower import ACTIVATIONS, Tower
from imagen_jax.typing import Array, TextEmb, TextMask

Streams: TypeAlias = tuple[Float[Array, 'b l d'], Float[Array, 'b l d']]

# By name, as in `ClipText(**SIZES['clip-l'])`: the encoders of ViT-B and of
# ViT-L/14, which the ablation uses.
SIZES = {
  'clip-b': dict(
    hidden_size=512, intermediate_size=2048, num_attention_heads=8
  ),
  'clip-l': dict(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12
  ),
}


class ClipTower(Tower):
  """CLIP's transformer, with its norms before each sublayer."""

  hidden_act: str = 'quick_gelu'

  def layer(
    self,
    x: Float[Array, 'b l d'],
    name: str = '',
    causal: bool = True,
  ) -> Float[jax.Array, 'b l d']:
    """One block of attention and MLP; its tensors' names start with `name`.

    A token sees those before it, never the padding, which is at the end; in an
    image, which is not `causal`, all see all.
    """
    (_, length, width), parts = x.shape, ('q_proj', 'k_proj', 'v_proj')
    seen = jnp.tril(jnp.ones((1, length, length), bool))
    logits = Logits(bias=jnp.where(seen, 0.0, MASKED)) if causal else None
    h = self.norm(f'{name}layer_norm1', x)
    h = self.attention(f'{name}self_attn', h, parts, logits=logits)
    y: Any = x + self.linear(f'{name}self_attn.out_proj', h, width)
    h = self.norm(f'{name}layer_norm2', y)
    h = self.linear(f'{name}mlp.fc1', h, self.intermediate_size)
    h = ACTIVATIONS[self.hidden_act](h)
    return y + self.linear(f'{name}mlp.fc2', h, width)


class ClipLayer(ClipTower):
  """One layer of a stack: the residual streams before and after it."""

  @nn.compact
  def __call__(self, x: Streams) -> tuple[Streams, None]:
    return (x[1], self.layer(x[1])), None


class ClipTextTower(ClipTower):
  """The text encoder's embeddings and sizes; the defaults are ViT-B's.

  Attributes:
    vocab_size: rows of the embedding table.
    max_position_embeddings: the most tokens of a caption.
  """

  hidden_size: int = 512
  intermediate_size: int = 2048
  num_attention_heads: int = 8
  vocab_size: int = 49408
  max_position_embeddings: int = 77
  PREFIX = 'text_model.encoder.layers'

  def inputs(self, ids: Int[Array, 'b l']) -> Float[jax.Array, 'b l d']:
    """What enters the first layer."""
    name, length = 'text_model.embeddings', ids.shape[1]
    x = self.embed(f'{name}.token_embedding', ids, self.vocab_size)
    return x + self.positions(
      f'{name}.position_embedding', length, self.max_position_embeddings
    )


class ClipText(ClipTextTower):
  """Token ids to contextual embeddings.

  Attributes:
    penultimate: the output of the layer before the last, as in the ablation
      (D.1), without a norm; else that of the last after the final norm,
      transformers' `last_hidden_state`.
  """

  penultimate: bool = False

  @nn.compact
  def __call__(self, ids: Int[Array, 'b l'], mask: TextMask) -> TextEmb:
    """Contextual embeddings of captions.

    Args:
      ids: [B, L] int32 tokens, each < vocab_size.
      mask: [B, L] bool, False at padding.

    Returns:
      [B, L, D] float32, exact zeros at padding.
    """
    x = self.inputs(ids)
    before, last = self.stack(ClipLayer, (x, x))
    last = self.norm('text_model.final_layer_norm', last)
    x = before if self.penultimate else last
    return jnp.where(mask[..., None], x, 0)
