"""Attention: one result in every form, on one device and on several."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import collectives, sharding
from imagen_jax.nets import dot_product
from imagen_jax.nets.dot_product import Logits, attention
from imagen_jax.training import flops

# (queries, keys, queries of a head at a time)
SMALL, LARGE, CHUNKED = (48, 60, 512), (256, 261, 512), (256, 261, 64)


def inputs(queries, keys, dtype=jnp.float32):
  """Queries, keys, values, a mask that hides all keys of row 1."""
  rng = np.random.default_rng(0)
  make = lambda n: jnp.asarray(rng.normal(size=(8, n, 2, 8)), dtype)
  mask = rng.random((8, keys)) < 0.7
  mask[1] = False
  return make(queries), make(keys), make(keys), jnp.asarray(mask)


def exact(q, k, v, mask):
  """The definition, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  logits = np.einsum('btnh,bsnh->bnts', q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(logits) * np.asarray(mask)[:, None, None, :]
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  return np.einsum('bnts,bsnh->btnh', weights, v), weights


def exact_gradients(q, k, v, mask, d_out):
  """Of queries, keys and values, by the chain rule in float64."""
  _, weights = exact(q, k, v, mask)
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  d_weights = np.einsum('btnh,bsnh->bnts', d_out, v)
  mean = np.sum(d_weights * weights, axis=-1, keepdims=True)
  d_logits = weights * (d_weights - mean) / np.sqrt(q.shape[-1])
  return (
    np.einsum('bnts,bsnh->btnh', d_logits, k),
    np.einsum('bnts,btnh->bsnh', d_logits, q),
    np.einsum('bnts,btnh->bsnh', weights, d_out),
  )


@jax.jit
def with_gradients(q, k, v, mask, d_out):
  out, back = jax.vjp(lambda *args: attention(*args, mask), q, k, v)
  return out, back(d_out)


@pytest.fixture
def chunk(request, monkeypatch):
  *shape, size = request.param
  monkeypatch.setattr(dot_product, 'CHUNK', size)
  with_gradients.clear_cache()
  return shape


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('chunk', [SMALL, LARGE, CHUNKED], indirect=True)
def test_values_and_gradients_are_those_of_the_definition(chunk, devices):
  *arrays, mask = inputs(*chunk)
  d_out = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape))
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  args = [*arrays, mask, d_out.astype(jnp.float32)]
  args = jax.device_put(args, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    out, gradients = with_gradients(*args)
  assert not np.any(out[1])  # it sees no key
  np.testing.assert_allclose(out, exact(*arrays, mask)[0], atol=1e-6)
  expected = exact_gradients(*arrays, mask, d_out)
  for gradient, right in zip(gradients, expected):
    np.testing.assert_allclose(gradient, right, atol=2e-6)


def test_rows_stay_on_their_devices():
  """XLA's partitioner gathers what a loop over rows reads."""
  *arrays, mask = inputs(*LARGE[:2])
  mesh = sharding.make_mesh(devices=jax.devices()[:8])
  args = [*arrays, mask, arrays[0]]
  args = jax.device_put(args, sharding.batch_sharding(mesh))
  with_gradients.clear_cache()
  with jax.set_mesh(mesh):
    text = with_gradients.lower(*args).compile().as_text()
  assert 'while' in text
  assert 'all-gather' not in text and 'all-reduce' not in text


def test_a_large_head_needs_no_memory_for_all_weights():
  def temporary(heads):
    shape = jax.ShapeDtypeStruct((2, 512, heads, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((2, 512), bool)
    with_gradients.clear_cache()
    compiled = with_gradients.lower(shape, shape, shape, mask, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  weights = 2 * 512**2 * 4  # bytes of one more head of both rows
  assert temporary(8) - temporary(2) < 6 * weights / 2


@pytest.mark.parametrize('shape', [SMALL, LARGE])
def test_half_precision_is_accumulated_in_float32(shape):
  q, *rest, mask = inputs(*shape[:2], jnp.bfloat16)
  arrays = 6 * q, *rest  # logits whose last bits in bfloat16 are 0.1 and more
  out = attention(*arrays, mask)
  assert out.dtype == jnp.bfloat16
  right, _ = exact(*arrays, mask)
  np.testing.assert_allclose(out.astype(np.float32), right, atol=2e-2)


@pytest.mark.parametrize('shape', [SMALL, LARGE])
def test_flops_are_of_the_whole_batch(shape):
  """2 products of 2 BNTSH each, whatever the devices."""
  q, k, v, mask = inputs(*shape[:2])
  counted = []
  for devices in (1, 8):
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:devices])):
      traced = jax.make_jaxpr(functools.partial(attention))(q, k, v, mask)
    counted.append(flops.count_flops(traced))
  products = 4 * 8 * 2 * shape[0] * shape[1] * 8
  assert products < counted[0] < 1.5 * products
  assert counted[0] == counted[1]


def test_cudnn_falls_back_where_it_cannot():
  q, k, v, mask = inputs(*SMALL[:2])
  np.testing.assert_array_equal(
    attention(q, k, v, mask, implementation='cudnn'), attention(q, k, v, mask)
  )
  with pytest.raises(ValueError):
    attention(q, k, v, implementation='flash9')


@pytest.mark.parametrize(
  'queries, keys, masked, fused',
  [
    (64, 80, True, True),
    (64, 77, True, False),
    (64, 77, False, False),
    (64, 80, False, True),
  ],
)
def test_cudnn_is_given_what_it_takes(
  monkeypatch, queries, keys, masked, fused
):
  """Its checks of shapes, on a machine without it."""
  q, k, v, mask = inputs(queries, keys, jnp.bfloat16)
  mask = mask if masked else None
  cudnn = importlib.import_module('jax._src.cudnn.fused_attention_stablehlo')
  monkeypatch.setattr(collectives, 'platform', lambda: ('gpu', 1))
  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(cudnn, 'check_compute_capability', lambda *_: True)
  total = lambda q: attention(q, k, v, mask, implementation='cudnn').sum()
  traced = str(jax.make_jaxpr(jax.grad(total))(q))
  assert ('dot_product_attention_fwd' in traced) == fused


def test_scale_cap_and_bias_and_their_gradients():
  """x = cap · tanh(scale · q kᵀ / cap) + bias, in which ∂x/∂bias is 1."""
  q, k, v, mask = inputs(*SMALL[:2])
  d_out = np.random.default_rng(1).normal(size=q.shape)
  bias = np.random.default_rng(2).normal(size=(2, q.shape[1], k.shape[1]))
  scale, cap = 0.5, 3.0

  def loss(bias):
    out = attention(q, k, v, mask, logits=Logits(scale, cap, bias))
    return jnp.sum(out * d_out)

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(bias, jnp.float32))
  products = np.einsum('btnh,bsnh->bnts', *(np.float64(x) for x in (q, k)))
  x = cap * np.tanh(scale * products / cap) + bias
  weights = np.exp(x) * np.asarray(mask)[:, None, None, :]
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  d_weights = np.einsum('btnh,bsnh->bnts', d_out, np.float64(v))
  mean = np.sum(d_weights * weights, axis=-1, keepdims=True)
  np.testing.assert_allclose(value, np.sum(d_weights * weights), rtol=1e-5)
  right = np.sum(weights * (d_weights - mean), axis=0)
  np.testing.assert_allclose(gradient, right, atol=2e-6)
