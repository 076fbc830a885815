"""Muon: stacked and divided among devices, it is optax's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax import sharding
from imagen_jax.training.muon import newton_schulz, orthogonalised
from imagen_jax.training.optimizer import matrix_axes, optimizer

SHAPES = {  # of kernels: matrices, convolutions, attention, stacked layers
  'dense': (8, 12),
  'other': (12, 8),
  'film': (3, 8, 12),
  'conv': (3, 3, 4, 6),
  'convs': (2, 3, 3, 4, 6),
  'query': (8, 2, 6),
  'out': (2, 6, 8),
}


def kernels(key=0):
  keys = jax.random.split(jax.random.key(key), len(SHAPES))
  return {
    name: {'kernel': jax.random.normal(k, shape), 'bias': jnp.ones(3)}
    for k, (name, shape) in zip(keys, SHAPES.items())
  }


def axes(tree):
  return jax.tree_util.tree_map_with_path(matrix_axes, tree)


@pytest.mark.parametrize(
  'options',
  [
    {'ns_coeffs': (2.0, -1.5, 0.5)},
    {'ns_steps': 3, 'nesterov': False},
    {'weight_decay': 0.1, 'beta': 0.8},
    {'ns_steps': 2, 'ns_coeffs': ((3.0, -4.0, 2.0), (2.0, -1.5, 0.5))},
  ],
)
def test_two_steps_are_those_of_optax(options):
  params, seen = kernels(), []
  theirs = optax.contrib.muon(
    1e-2, consistent_rms=0.2, muon_weight_dimension_numbers=axes, **options
  )
  for tx in (theirs, optimizer(1e-2, kind='muon', clip=None, **options)):
    state = tx.init(params)
    for step in (1, 2):
      updates, state = jax.jit(tx.update)(kernels(step), state, params)
    seen.append(updates)
  near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(near, *seen)


@pytest.mark.parametrize('steps', [5, 3])
def test_it_iterates_in_a_loop_and_gives_what_optax_does(steps):
  params = {'dense': {'kernel': jax.random.normal(jax.random.key(0), (8, 12))}}
  theirs = optax.contrib.muon(1e-2, ns_steps=steps, consistent_rms=0.2)
  ours = optimizer(1e-2, kind='muon', clip=None, ns_steps=steps)
  of_ours = lambda grads: ours.update(grads, ours.init(params), params)[0]
  of_theirs = lambda grads: theirs.update(grads, theirs.init(params), params)[0]
  np.testing.assert_allclose(
    of_ours(params)['dense']['kernel'],
    of_theirs(params)['dense']['kernel'],
    rtol=1e-5,
  )
  assert ' while(' in jax.jit(of_ours).lower(params).compile().as_text()


@pytest.mark.parametrize('rows', [None, (3.4445, -4.7750, 2.0315)])
def test_its_checkpoints_are_those_of_optax(rows):
  params = kernels()
  rate = optax.linear_schedule(0.0, 1e-2, 5)
  theirs = optax.contrib.muon(
    rate,
    rows or ((3.4445, -4.7750, 2.0315),) * 5,
    muon_weight_dimension_numbers=axes,
  )
  ours = optimizer(rate, kind='muon', clip=None, ns_coeffs=rows)
  named = []
  for tx in (optax.chain(theirs), ours):
    shapes = jax.eval_shape(tx.init, params)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    named.append({jax.tree_util.keystr(path): x for path, x in leaves})
  assert named[0] == named[1]


@pytest.mark.parametrize('data, fsdp', [(2, 1), (4, 2)])
def test_devices_divide_the_matrices(data, fsdp):
  only = {name: {'kernel': x['kernel']} for name, x in kernels().items()}
  function = jax.jit(lambda tree: orthogonalised(tree, matrix_axes))
  alone = function(only)
  mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
  with jax.set_mesh(mesh):
    placed = jax.device_put(only, sharding.replicated(mesh))
    program = function.lower(placed).compile()
    together = program(placed)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5), alone, together
  )
  # [8, 12] and its transpose, three of `film`, query and out: seven are one
  # stack, of which each device has a part.
  per_device = -(-7 // (data * fsdp))
  assert f'f32[{per_device},8,12]' in program.as_text()
  assert 'f32[7,8,8]' not in program.as_text()


@pytest.mark.parametrize('gram', [False, True])
def test_momentum_in_bfloat16_is_orthogonalised_in_float32(gram):
  x = jax.random.normal(jax.random.key(0), (2, 4, 16), jnp.bfloat16)
  found = newton_schulz(x, gram=gram)
  assert found.dtype == jnp.float32
  expected = newton_schulz(x.astype(jnp.float32), gram=gram)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('condition', [1.0, 1e5])
def test_iterating_on_the_gram_matrix_gives_the_same(condition):
  """Also of matrices with singular values that float32 loses in the square."""
  keys = jax.random.split(jax.random.key(0), 2)
  u, _, v = jnp.linalg.svd(jax.random.normal(keys[0], (2, 16, 96)), False)
  sizes = jnp.geomspace(1.0, 1 / condition, 16)
  x = (u * sizes) @ v
  plain, gram = (newton_schulz(x, gram=form) for form in (False, True))
  kept = np.asarray(sizes / jnp.linalg.norm(sizes)) > 1e-3
  inside = lambda y: np.asarray(u.mT @ y @ v.mT)[:, kept][:, :, kept]
  np.testing.assert_allclose(inside(gram), inside(plain), atol=2e-3)
  assert np.linalg.svd(gram, compute_uv=False).max() < 1.3
