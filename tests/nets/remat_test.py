"""Which values of a block the backward pass computes again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.nets.attention import TextAttention
from imagen_jax.nets.layers import ResBlock
from imagen_jax.nets.remat import POLICIES, remat
from imagen_jax.training.flops import count_flops, inner_jaxpr

X = jnp.linspace(-1, 1, 2 * 8 * 8 * 32).reshape(2, 8, 8, 32)
EMB = jnp.linspace(-1, 1, 2 * 16).reshape(2, 16)
TEXT = jnp.linspace(-1, 1, 2 * 4 * 16).reshape(2, 4, 16)
MASK = jnp.ones((2, 4), bool)
BLOCKS = {
  'residual': (ResBlock, (32,), (X, EMB)),
  'attention': (TextAttention, (16,), (X, TEXT, MASK)),
}


@functools.cache
def gradient(block, policy, dtype='float32'):
  """(gradient with respect to parameters and x, the parameters)."""
  kind, sizes, (x, *rest) = BLOCKS[block]
  net = remat(kind, policy)(*sizes, dtype=jnp.dtype(dtype), name='block')
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, *rest)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  params = jax.tree.map(
    lambda s: 0.1 * jax.random.normal(next(keys), s.shape), shapes
  )
  loss = lambda params, x: jnp.sum(jnp.sin(net.apply(params, x, *rest)))
  return jax.grad(loss, argnums=(0, 1)), params


def count(block, policy, name, dtype='float32'):
  """How often an operation is computed for a gradient."""

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      inner = inner_jaxpr(eqn)
      yield from [eqn.primitive.name] if inner is None else walk(inner)

  fn, params = gradient(block, policy, dtype)
  return list(walk(jax.make_jaxpr(fn)(params, X).jaxpr)).count(name)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_no_convolution_is_computed_twice_if_all_are_saved(dtype):
  found = {
    policy: count('residual', policy, 'conv_general_dilated', dtype)
    for policy in (None, *POLICIES)
  }
  assert found['convs_saveable'] == found[None]
  # The first; of the second only the inputs are needed.
  assert found['nothing_saveable'] == found[None] + 1


def test_norms_and_activations_are_computed_again():
  again = count('residual', 'convs_saveable', 'logistic')
  assert again > count('residual', None, 'logistic')


def test_an_attentions_weights_are_computed_again_and_its_layers_are_not():
  """Three products have no kernel: q kᵀ, that with v, a norm's origin."""
  counts = {
    policy: count('attention', policy, 'dot_general')
    for policy in (None, *POLICIES)
  }
  assert counts['dots_saveable'] == counts[None]
  assert counts['convs_saveable'] == counts[None] + 3
  assert counts['nothing_saveable'] > counts['convs_saveable']


def test_what_is_saved_changes_no_gradient():
  for block in BLOCKS:
    plain, params = gradient(block, None)
    wanted = jax.tree.leaves(jax.jit(plain)(params, X))
    scale = max(np.abs(leaf).max() for leaf in wanted)
    for policy in POLICIES:
      found = jax.jit(gradient(block, policy)[0])(params, X)
      for a, b in zip(jax.tree.leaves(found), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize('block', BLOCKS)
def test_the_policies_are_in_the_order_of_their_flops(block):
  flops = [
    count_flops(jax.make_jaxpr(fn)(params, X))
    for fn, params in (gradient(block, p) for p in (*POLICIES, None))
  ]
  assert flops == sorted(flops, reverse=True)
