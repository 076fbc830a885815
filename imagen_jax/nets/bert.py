"""BERT's encoder (Devlin et al. 2018), of Imagen's ablation (D.1).

MiniLM and the BERTs of sentence-transformers are of the same form.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Int

from imagen_jax.nets.tower import ACTIVATIONS, Tower
from imagen_jax.typing import Array, TextEmb, TextMask

# By name, as in `Bert(**SIZES['bert-large'])`.
SIZES = {
  'bert-base': dict(
    hidden_size=768,
    intermediate_size=3072,
    num_attention_heads=12,
    num_hidden_layers=12,
  ),
  'bert-large': dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_hidden_layers=24,
  ),
}


class BertLayer(Tower):
  """One layer, whose norms are after each sublayer."""

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b l d'], mask: TextMask
  ) -> tuple[Float[Array, 'b l d'], None]:
    width, parts = self.hidden_size, ('query', 'key', 'value')
    h = self.attention('attention.self', x, parts, mask)
    h = self.linear('attention.output.dense', h, width)
    x = self.norm('attention.output.LayerNorm', x + h)
    h = self.linear('intermediate.dense', x, self.intermediate_size)
    h = ACTIVATIONS[self.hidden_act](h)
    h = self.linear('output.dense', h, width)
    return self.norm('output.LayerNorm', x + h), None


class Bert(Tower):
  """Token ids to contextual embeddings; the defaults are the base model's.

  Attributes:
    vocab_size: rows of the embedding table.
    max_position_embeddings: the most tokens of a caption.
    type_vocab_size: kinds of sentences; a caption is of the first.
  """

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_attention_heads: int = 12
  layer_norm_eps: float = 1e-12
  vocab_size: int = 30522
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  PREFIX = 'encoder.layer'

  @nn.compact
  def __call__(self, ids: Int[Array, 'b l'], mask: TextMask) -> TextEmb:
    """Contextual embeddings of captions, the last layer's.

    Args:
      ids: [B, L] int32 tokens, each < vocab_size.
      mask: [B, L] bool, False at padding.

    Returns:
      [B, L, D] float32, exact zeros at padding.
    """
    name, width = 'embeddings', self.hidden_size
    x = self.embed(f'{name}.word_embeddings', ids, self.vocab_size)
    kinds = f'{name}.token_type_embeddings.weight'
    x = x + self.tensor(kinds, self.type_vocab_size, width)[0]
    x = x + self.positions(
      f'{name}.position_embeddings', ids.shape[1], self.max_position_embeddings
    )
    x = self.norm(f'{name}.LayerNorm', x)
    x = self.stack(BertLayer, x, mask)
    return jnp.where(mask[..., None], x, 0)
