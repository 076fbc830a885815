"""The networks of text pretraining: the encoder, and a small decoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from imagen_jax.nets.norm import LayerNorm
from imagen_jax.nets.t5 import T5Encoder
from imagen_jax.text.tokenizer import PAD
from imagen_jax.typing import Array, TextEmb, TextMask
from imagen_jax.worlds.tasks import TARGET_LEN

Params: TypeAlias = dict[str, Any]


def directions(
  encoder: T5Encoder, strength: float = 2.0
) -> Float[np.ndarray, 'buckets heads']:
  """Offset to T5's initial relative position bias.

  Relations depend on word order, and this bias is a T5's only source of order.
  Initialised near zero, a small encoder learns words in minutes but hardly
  learns order. It learns both if its heads start out attending backwards,
  forwards, nearby backwards and nearby forwards.
  """
  half = encoder.num_buckets // 2
  bias = np.empty((encoder.num_buckets, encoder.num_heads), np.float32)
  for head in range(encoder.num_heads):
    sign = 1 if head % 2 else -1
    near = 0.5 * (head // 2 % 2) * np.arange(half)
    bias[:half, head] = -sign * strength - near  # keys before the query
    bias[half:, head] = sign * strength - near
  return bias


class Decoder(nn.Module):
  """A small Transformer decoder, used in pretraining only."""

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int

  @nn.compact
  def __call__(
    self,
    previous: Int[Array, 'b t'],
    memory: TextEmb,
    visible: TextMask,
  ) -> Float[Array, 'b t vocabulary']:
    """Logits of each token, given the previous ones and the encoder's output.

    Args:
      previous: token ids, shifted by one.
      memory: the encoder's output.
      visible: the positions of it that are attended to.
    """
    init = nn.initializers.normal(0.02)
    x = nn.Embed(self.vocab_size, self.width, embedding_init=init)(previous)
    x = x + self.param('position', init, (previous.shape[1], self.width))
    causal = nn.make_causal_mask(previous)
    for _ in range(self.num_layers):
      h = LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(self.num_heads)(h, mask=causal)
      h = LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(self.num_heads)(
        h, memory, mask=visible[:, None, None, :]
      )
      h = nn.Dense(2 * self.width)(LayerNorm()(x))
      x = x + nn.Dense(self.width)(nn.gelu(h))
    return nn.Dense(self.vocab_size)(LayerNorm()(x))


@dataclasses.dataclass(frozen=True)
class TextModel:
  """The encoder and the decoder that are trained together."""

  encoder: T5Encoder
  decoder: Decoder

  def init(self, key: jax.Array) -> Params:
    """{'encoder': …, 'decoder': …}, with `directions` in the encoder."""
    ids = jnp.zeros((1, TARGET_LEN), jnp.int32)
    memory = jnp.zeros((1, TARGET_LEN, self.encoder.width))
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    encoder = self.encoder.init(keys[0], ids, ids == 0)['params']
    decoder = self.decoder.init(keys[1], ids, memory, ids == 0)['params']
    encoder['distance_bias'] += directions(self.encoder)
    return {'encoder': encoder, 'decoder': decoder}

  def encode(
    self, params: Params, ids: Int[Array, 'b l'], mask: TextMask
  ) -> TextEmb:
    emb: Any = self.encoder.apply({'params': params['encoder']}, ids, mask)
    return emb

  def logits(
    self,
    params: Params,
    memory: TextEmb,
    visible: TextMask,
    target: Int[Array, 'b t'],
  ) -> Float[Array, 'b t vocabulary']:
    """Logits of each token of `target`, given those before it."""
    previous = jnp.pad(target[:, :-1], ((0, 0), (1, 0)))
    logits: Any = self.decoder.apply(
      {'params': params['decoder']}, previous, memory, visible
    )
    return logits

  def loss(
    self, params: Params, batch: Mapping[str, Array]
  ) -> Float[Array, ' b']:
    """Cross-entropy in nats, scaled so that its mean is over all tokens."""
    target = batch['target']
    memory = self.encode(params, batch['ids'], batch['mask'])
    logits = self.logits(params, memory, batch['visible'], target)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    weight = target != PAD
    rows = jnp.sum(nats * weight, axis=1)
    return rows * (len(target) / jnp.sum(weight))

  def decode(
    self,
    params: Params,
    ids: Int[Array, 'b l'],
    mask: TextMask,
    visible: TextMask,
  ) -> Int[Array, 'b t']:
    """Greedy decoding."""
    memory = self.encode(params, ids, mask)

    def step(t: jax.Array, said: jax.Array) -> jax.Array:
      logits = self.logits(params, memory, visible, said)
      return said.at[:, t].set(jnp.argmax(logits[:, t], axis=-1))

    start = jnp.zeros((len(ids), TARGET_LEN), jnp.int32)
    return jax.lax.fori_loop(0, TARGET_LEN, step, start)
