"""What the towers of published transformers share (Vaswani et al. 2017).

Parameters have the names and layouts of the Hugging Face tensors, so weights
are used without conversion. Each is gathered where it is used.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from imagen_jax import collectives
from imagen_jax.nets.dot_product import Logits, attention
from imagen_jax.typing import Array, TextMask

ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_new': jax.nn.gelu,
  'gelu_pytorch_tanh': jax.nn.gelu,
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'relu': jax.nn.relu,
}


def unroll(layers: int, dtype: DTypeLike) -> int:
  """How many of the layers an iteration of the scan over them computes.

  All on a CPU in bfloat16: there XLA converts a stack that a loop slices to
  float32, as a whole and every time, which takes longer than the layers.
  """
  slow = dtype == jnp.bfloat16 and collectives.platform()[0] == 'cpu'
  return max(layers, 2) if slow else 1  # 1 is a loop, even of one iteration


class Tower(nn.Module):
  """A transformer whose parameters have dotted names.

  Attributes:
    hidden_size: D, width of the residual stream.
    intermediate_size: width of the feed-forward.
    num_attention_heads, num_hidden_layers: how many.
    hidden_act: one of `ACTIVATIONS`.
    layer_norm_eps: of the norms.
    dtype: of the matrix products. The residual stream, the norms, the
      attention logits and the softmax are always float32.
  """

  hidden_size: int
  intermediate_size: int
  num_attention_heads: int
  num_hidden_layers: int = 12
  hidden_act: str = 'gelu'
  layer_norm_eps: float = 1e-5
  dtype: DTypeLike = jnp.float32

  @property
  def width(self) -> int:
    return self.hidden_size

  @property
  def precision(self) -> str | None:
    # TPUs and recent GPUs otherwise multiply float32 with fewer bits.
    return 'highest' if self.dtype == jnp.float32 else None

  def table(self, name: str, *shape: int) -> jax.Array:
    """A parameter as it is stored, of which only some rows are used."""
    return self.param(name, nn.initializers.normal(0.02), shape)

  def tensor(self, name: str, *shape: int) -> jax.Array:
    """A parameter, gathered: matrices in `dtype`, vectors in their own."""
    kind = self.dtype if len(shape) > 1 else None
    table = self.table(name, *shape)
    gathered: Any = collectives.gather(table, kind, stacked=True)
    return gathered

  def linear(
    self, name: str, x: Array, features: int, bias: bool = True
  ) -> jax.Array:
    """x W^T + b in float32."""
    weight = self.tensor(f'{name}.weight', features, x.shape[-1])
    y = jnp.dot(
      x.astype(self.dtype),
      weight.T,
      precision=self.precision,
      preferred_element_type=jnp.float32,
    )
    return y + self.tensor(f'{name}.bias', features) if bias else y

  def norm(self, name: str, x: Array) -> jax.Array:
    """Layer normalisation (Ba et al. 2016)."""
    y: Any = x - x.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.layer_norm_eps)
    scale = self.tensor(f'{name}.weight', x.shape[-1])
    return y * scale + self.tensor(f'{name}.bias', x.shape[-1])

  def embed(self, name: str, ids: Int[Array, 'b l'], rows: int) -> jax.Array:
    """Rows of a table of tokens, in float32."""
    table = self.table(f'{name}.weight', rows, self.hidden_size)
    # Else the sharding of the table would spread to all activations.
    return collectives.constrain_batch(table[ids].astype(jnp.float32))

  def stack(self, block: type['Tower'], x: Any, *given: Array) -> Any:
    """x after all layers, which are one scan over stacked parameters.

    Args:
      block: a layer: (x, *given) -> (x, None), with a tower's attributes.
      x: carried from layer to layer.
      given: the same for all layers.
    """
    layers: Any = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=self.num_hidden_layers,
      unroll=unroll(self.num_hidden_layers, self.dtype),
    )
    names = {f.name for f in dataclasses.fields(block)} - {'parent', 'name'}
    sizes = {name: getattr(self, name) for name in names}
    return layers(**sizes, name='layers')(x, *given)[0]

  def positions(self, name: str, length: int, rows: int) -> jax.Array:
    """The first rows of a table of positions."""
    return self.tensor(f'{name}.weight', rows, self.hidden_size)[:length]

  def attention(
    self,
    name: str,
    x: Float[Array, 'b l d'],
    parts: tuple[str, str, str],
    mask: TextMask | None = None,
    logits: Logits | None = None,
  ) -> Float[jax.Array, 'b l d']:
    """Multi-head self-attention before its output projection.

    Args:
      name: of the attention's tensors.
      x: what attends and is attended to.
      parts: last names of the query's, key's and value's projections.
      mask, logits: see `dot_product.attention`.
    """
    batch, length, width = x.shape
    q, k, v = (
      self.linear(f'{name}.{part}', x, width)
      .reshape(batch, length, self.num_attention_heads, -1)
      .astype(self.dtype)
      for part in parts
    )
    return self.attend(q, k, v, mask, logits)

  def attend(
    self,
    q: Float[Array, 'b l h s'],
    k: Float[Array, 'b l h s'],
    v: Float[Array, 'b l h s'],
    mask: TextMask | None,
    logits: Logits | None,
  ) -> Float[jax.Array, 'b l d']:
    """`dot_product.attention` of heads, side by side."""
    with jax.default_matmul_precision(self.precision):
      out: Any = attention(q, k, v, mask, logits=logits)
    return out.reshape(*q.shape[:2], -1)
