"""The T5 encoder, Imagen's frozen text encoder (Section 2.1).

One module covers v1.0 (ReLU), v1.1 and Flan (gated GELU). The layers are one
`nn.scan` over stacked parameters, so that XXL's 24 compile as fast as one, but
on a CPU in bfloat16 (`tower.unroll`).
Specific to T5: RMS norm without bias before each sublayer, attention logits
not divided by √head size, and a learned bias on the distance between two
tokens, shared by all layers (Raffel et al. 2020, Section 2.1).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from imagen_jax import collectives
from imagen_jax.nets.dot_product import Logits, attention
from imagen_jax.nets.tower import unroll
from imagen_jax.typing import Array, TextEmb, TextMask

# T5 v1.1 and Flan by name, as in `T5Encoder(**SIZES['xxl'])`: Imagen's encoder
# and the smaller ones of its ablation (Appendix D.1).
SIZES = {
  'small': dict(width=512, num_layers=8, num_heads=6, mlp_dim=1024),
  'base': dict(width=768, num_layers=12, num_heads=12, mlp_dim=2048),
  'large': dict(width=1024, num_layers=24, num_heads=16, mlp_dim=2816),
  'xl': dict(width=2048, num_layers=24, num_heads=32, mlp_dim=5120),
  'xxl': dict(width=4096, num_layers=24, num_heads=64, mlp_dim=10240),
}


def distance_buckets(
  length: int, *, num_buckets: int, max_distance: int
) -> Int[np.ndarray, '{length} {length}']:
  """The bucket of the distance between each query and key.

  Half of the buckets are for keys after the query, half for the others. In
  each half, the first half of the buckets hold one distance each; the others
  grow geometrically up to `max_distance`, beyond which all share the last.
  """
  position = np.arange(length)
  distance = position[None, :] - position[:, None]
  half = num_buckets // 2
  exact = half // 2
  far = np.maximum(np.abs(distance), exact)
  # float32, as in training: at the edge of a bucket the rounding decides which
  # bucket a distance is in.
  fraction = np.log((far / exact).astype(np.float32)) / np.float32(
    math.log(max_distance / exact)
  )
  far = exact + (fraction * np.float32(half - exact)).astype(np.int32)
  bucket = np.where(
    np.abs(distance) < exact, np.abs(distance), np.minimum(far, half - 1)
  )
  return (bucket + half * (distance > 0)).astype(np.int32)


def _rms_norm(
  x: Float[Array, 'b l d'], scale: Float[Array, ' d'], epsilon: float
) -> Float[Array, 'b l d']:
  """x / rms(x) · scale in float32: T5's LayerNorm has no mean and no bias."""
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean_square + epsilon) * scale


class _Block(nn.Module):
  """One layer: self-attention and feed-forward, both residual."""

  num_heads: int
  head_dim: int
  mlp_dim: int
  gated: bool
  epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b l d'],
    bias: Float[Array, 'heads l l'],
    mask: TextMask,
  ) -> tuple[Float[Array, 'b l d'], None]:
    """The residual stream x after this layer, in float32."""
    width, heads, size = x.shape[-1], self.num_heads, self.head_dim
    # TPUs and recent GPUs otherwise multiply float32 with fewer bits.
    precision = 'highest' if self.dtype == jnp.float32 else None

    def weight(name: str, shape: tuple[int, ...], fan: int) -> Array:
      init = nn.initializers.normal(fan**-0.5)
      param = self.param(name, init, shape)
      return collectives.gather(param, self.dtype, stacked=True)

    def product(
      equation: str, a: Array, b: Array, out: DTypeLike = self.dtype
    ) -> jax.Array:
      return jnp.einsum(
        equation, a, b, precision=precision, preferred_element_type=out
      )

    def norm(name: str, x: Float[Array, 'b l d']) -> Float[Array, 'b l d']:
      scale = self.param(name, nn.initializers.ones, (width,))
      x = _rms_norm(x, collectives.gather(scale), self.epsilon)
      return x.astype(self.dtype)

    heads_in = width, heads, size
    h = norm('attention_norm', x)
    # The logits are not scaled by 1/√size; the query's initialisation is.
    q = product('btd,dnh->btnh', h, weight('query', heads_in, width * size))
    k = product('btd,dnh->btnh', h, weight('key', heads_in, width))
    v = product('btd,dnh->btnh', h, weight('value', heads_in, width))
    with jax.default_matmul_precision(precision):
      h = attention(q, k, v, mask, logits=Logits(scale=1.0, bias=bias))
    w = weight('out', (heads, size, width), heads * size)
    x = x + product('btnh,nhd->btd', h, w, jnp.float32)

    h = norm('mlp_norm', x)
    mlp_in = width, self.mlp_dim
    if self.gated:
      # Both families were trained with the tanh approximation of GELU.
      gate = product('btd,df->btf', h, weight('gate', mlp_in, width))
      h = product('btd,df->btf', h, weight('in', mlp_in, width))
      h = jax.nn.gelu(gate, approximate=True) * h
    else:
      h = jax.nn.relu(product('btd,df->btf', h, weight('in', mlp_in, width)))
    w = weight('mlp_out', mlp_in[::-1], self.mlp_dim)
    return x + product('btf,fd->btd', h, w, jnp.float32), None


class T5Encoder(nn.Module):
  """Token ids to contextual embeddings; the defaults are v1.1 XXL's.

  Attributes:
    vocab_size: rows of the embedding table.
    width: D, of the embeddings (`d_model`).
    num_layers: number of layers.
    num_heads: heads per layer.
    head_dim: size of a head (`d_kv`).
    mlp_dim: width of the feed-forward (`d_ff`).
    gated: gated GELU (v1.1, Flan) instead of ReLU (v1.0).
    num_buckets: of the distance bias.
    max_distance: distances from here on share a bucket.
    epsilon: of the norms.
    dtype: of the matrix products. The residual stream, the norms, the
      attention logits and the softmax are always float32.
  """

  vocab_size: int = 32128
  width: int = 4096
  num_layers: int = 24
  num_heads: int = 64
  head_dim: int = 64
  mlp_dim: int = 10240
  gated: bool = True
  num_buckets: int = 32
  max_distance: int = 128
  epsilon: float = 1e-6
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, ids: Int[Array, 'b l'], mask: TextMask, keep_padding: bool = False
  ) -> TextEmb:
    """Contextual embeddings of captions.

    Args:
      ids: [B, L] int32 tokens, each < vocab_size.
      mask: [B, L] bool, False at padding.
      keep_padding: return the layers' output at padding too, for networks that
        were trained to attend to it.

    Returns:
      [B, L, D] float32, exact zeros at padding unless it is kept; a row of
      padding only is then all zeros, whatever its ids.
    """
    table = self.param(
      'embedding', nn.initializers.normal(1.0), (self.vocab_size, self.width)
    )
    distances = self.param(
      'distance_bias',
      nn.initializers.normal(self.width**-0.5),
      (self.num_buckets, self.num_heads),
    )
    buckets = distance_buckets(
      ids.shape[1],
      num_buckets=self.num_buckets,
      max_distance=self.max_distance,
    )
    bias = jnp.moveaxis(distances[buckets], -1, 0).astype(jnp.float32)
    blocks = nn.scan(
      _Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=self.num_layers,
      unroll=unroll(self.num_layers, self.dtype),
    )(
      self.num_heads,
      self.head_dim,
      self.mlp_dim,
      self.gated,
      self.epsilon,
      self.dtype,
      name='layers',
    )
    # Else the sharding of the table would spread to all activations.
    x: Array = collectives.constrain_batch(table[ids].astype(jnp.float32))
    x, _ = blocks(x, bias, mask)
    scale = self.param('norm', nn.initializers.ones, (self.width,))
    x = _rms_norm(x, scale, self.epsilon)
    return x if keep_padding else jnp.where(mask[..., None], x, 0)
