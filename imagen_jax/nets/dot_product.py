"""Scaled dot-product attention (Vaswani et al. 2017), for every network here.

One function; how it computes is chosen by the platform and by the shapes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from imagen_jax import collectives
from imagen_jax.typing import Array

# On a CPU the logits of a head are kept in its caches from here on. Fewer are
# multiplied faster in one batch (docs/speed.md).
LARGE = 2**16
CHUNK = 512  # queries of a head at a time, at most
MASKED = -1e30  # finite, so that no key at all gives no NaN

Queries = Float[Array, 'b t heads size']
Keys = Float[Array, 'b s heads size']
KeyMask = Bool[Array, 'b s']


@dataclasses.dataclass(frozen=True)
class Logits:
  """cap · tanh(scale · q kᵀ / cap) + bias, what the softmax is of.

  Attributes:
    scale: None is 1 / √size; T5 has 1.
    cap: None caps none (Gemma 2).
    bias: [N, T, S] or [1, T, S], of T5's distances or a causal mask.
  """

  scale: float | None = None
  cap: float | None = None
  bias: Float[Array, '#heads t s'] | None = None

  def __call__(self, products: Array, size: int) -> Array:
    """Those of products q kᵀ [B, N, T, S] of heads of a size."""
    x = products * (size**-0.5 if self.scale is None else self.scale)
    x = x if self.cap is None else self.cap * jnp.tanh(x / self.cap)
    return x if self.bias is None else x + self.bias


def attention(
  q: Queries,
  k: Keys,
  v: Keys,
  mask: KeyMask | None = None,
  *,
  logits: Logits | None = None,
  implementation: str = 'xla',
) -> Queries:
  """softmax(q kᵀ / √size) v, in which masked keys contribute nothing.

  On a CPU heads are multiplied one by one if they are large, and the backward
  pass computes the weights again (as in Dao et al. 2022, algorithm 4): memory
  is that of one head's weights.

  Args:
    q: [B, T, N, H] queries, N heads of size H.
    k: [B, S, N, H] keys.
    v: [B, S, N, H] values.
    mask: [B, S] bool, False where a key is masked; None masks none. A row
      whose keys are all masked gives exact zeros (softmax alone would give the
      mean of v).
    logits: what the softmax is of; None is q kᵀ / √size. Others are computed
      for all heads in one batch, on every platform: captions are short.
    implementation: 'xla', or 'cudnn' on an NVIDIA GPU. cuDNN supports half
      precision, head sizes that are multiples of 8 up to 128, and even T and S;
      'xla' is used for all else.

  Returns:
    [B, T, N, H] in q's dtype; the softmax is computed in float32.

  Raises:
    ValueError: for an unknown implementation.
  """
  if implementation not in ('xla', 'cudnn'):
    raise ValueError(f'attention implementation {implementation!r}')
  platform, devices = collectives.platform()
  large = q.shape[1] * k.shape[1] >= LARGE and q.shape[0] % devices == 0
  if logits or (platform == 'cpu' and not large):
    out = _heads_first(q, k, v, mask, logits or Logits())
  elif platform == 'cpu':
    out = _by_head(q, k, v, mask)
  else:
    fused = implementation == 'cudnn' and platform == 'gpu'
    fused = fused and _cudnn_can(q, k)
    keys_mask = None if mask is None else mask[:, None, None, :]
    if fused and keys_mask is not None:  # which it does not broadcast
      keys_mask = jnp.broadcast_to(
        keys_mask, (len(q), 1, q.shape[1], k.shape[1])
      )
    out = jax.nn.dot_product_attention(
      q, k, v, mask=keys_mask, implementation='cudnn' if fused else 'xla'
    )
  if mask is not None:
    out = jnp.where(jnp.any(mask, axis=-1)[:, None, None, None], out, 0)
  return out.astype(q.dtype)


def _cudnn_can(q: Queries, k: Keys) -> bool:
  """Whether cuDNN's fused attention supports these shapes."""
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  even = q.shape[1] % 2 == k.shape[1] % 2 == 0
  return half and even and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _heads_first(
  q: Queries, k: Keys, v: Keys, mask: KeyMask | None, logits: Logits
) -> Array:
  """One batched product of all heads, whose operands are made contiguous."""
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  products = jnp.einsum(
    'bnth,bnsh->bnts', q, k, preferred_element_type=jnp.float32
  )
  x = logits(products, q.shape[-1])
  if mask is not None:
    x = jnp.where(mask[:, None, None, :], x, MASKED)
  weights = jax.nn.softmax(x, axis=-1).astype(v.dtype)
  out = jnp.einsum(
    'bnts,bnsh->bnth', weights, v, preferred_element_type=jnp.float32
  )
  return jnp.swapaxes(out, 1, 2)


def _by_head(q: Queries, k: Keys, v: Keys, mask: KeyMask | None) -> jax.Array:
  """Every head of every row by itself, on the device that holds the row."""
  heads = q.shape[2]
  seen = jnp.ones(k.shape[:2], bool) if mask is None else mask
  bias = jnp.where(seen, 0.0, MASKED).astype(jnp.float32)

  def local(q: Queries, k: Keys, v: Keys, bias: Array) -> jax.Array:
    split = lambda x: jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])
    out = _heads(split(q), split(k), split(v), jnp.repeat(bias, heads, axis=0))
    return jnp.swapaxes(out.reshape(-1, heads, *out.shape[1:]), 1, 2)

  return collectives.per_device(local, (0, 0, 0, 0), 0)(q, k, v, bias)


@jax.custom_vjp
def _heads(q: Array, k: Array, v: Array, bias: Array) -> jax.Array:
  """[G, T, H] queries of G heads, [G, S, H] keys, [G, S] -> [G, T, H]."""
  return _heads_forward(q, k, v, bias)[0]


def _heads_forward(
  q: Array, k: Array, v: Array, bias: Array
) -> tuple[jax.Array, tuple[Array, ...]]:
  """The result, and what the backward pass needs."""
  scale = q.shape[-1] ** -0.5

  def head(args: tuple[Array, ...]) -> tuple[jax.Array, jax.Array]:
    q, k, v, bias = args

    def part(q: Array) -> tuple[jax.Array, jax.Array]:
      logits = _product(q, k.T) * scale + bias
      top = jnp.max(logits, axis=-1, keepdims=True)
      weights = jnp.exp(logits - top)
      total = jnp.sum(weights, axis=-1, keepdims=True)
      return _product(weights.astype(v.dtype), v) / total, top + jnp.log(total)

    out, norm = jax.lax.map(part, _chunks(q))
    return out.reshape(q.shape), norm.reshape(-1, 1)

  out, norm = jax.lax.map(head, (q, k, v, bias))
  return out, (q, k, v, bias, out, norm)


def _heads_backward(
  saved: tuple[Array, ...], d_out: Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """Gradients of queries, keys and values."""
  q, k, v = saved[:3]
  scale = q.shape[-1] ** -0.5

  def head(args: tuple[Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, bias, out, norm, d_out = args
    dot = jnp.sum(d_out * out, axis=-1, keepdims=True)

    def part(
      sums: tuple[jax.Array, jax.Array], args: tuple[Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
      q, norm, dot, d_out = args
      weights = jnp.exp(_product(q, k.T) * scale + bias - norm)
      d_logits = (weights * (_product(d_out, v.T) - dot)).astype(q.dtype)
      d_v = _product(weights.astype(q.dtype).T, d_out)
      sums = sums[0] + _product(d_logits.T, q), sums[1] + d_v
      return sums, _product(d_logits, k)

    zeros = jnp.zeros(k.shape, jnp.float32)
    chunks = map(_chunks, (q, norm, dot, d_out.astype(q.dtype)))
    (d_k, d_v), d_q = jax.lax.scan(part, (zeros, zeros), tuple(chunks))
    return d_q.reshape(q.shape), d_k, d_v

  d_q, d_k, d_v = jax.lax.map(head, (*saved, d_out))
  return (
    (d_q * scale).astype(q.dtype),
    (d_k * scale).astype(k.dtype),
    d_v.astype(v.dtype),
    None,
  )


_heads.defvjp(_heads_forward, _heads_backward)


def _product(a: Array, b: Array) -> jax.Array:
  """Matrix product, accumulated in float32."""
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _chunks(x: Array) -> jax.Array:
  """[T, …] -> [T / C, C, …]."""
  size = CHUNK if x.shape[0] % CHUNK == 0 else x.shape[0]
  return jnp.reshape(x, (-1, size, *x.shape[1:]))
