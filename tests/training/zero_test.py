"""`mesh.zero`: EMA and optimizer state are split over all devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.nets.layers import ResBlock
from imagen_jax.planning import analytic
from imagen_jax.planning.compile import collectives
from imagen_jax.training import replicas
from imagen_jax.training.optimizer import optimizer
from imagen_jax.training.program import state_shardings
from imagen_jax.training.report import device_bytes
from imagen_jax.training.state import init_state
from imagen_jax.training.step import make_train_step

LENGTHS = (0.1,)
ROWS = 16


def loss_fn(net):
  def loss(params, key, batch, frozen):
    y = net.apply({'params': params}, batch['x'], batch['emb'])
    error = jnp.square(y.astype(jnp.float32) - batch['y'])
    return jnp.mean(error, axis=(1, 2, 3)), {}

  return loss


@functools.cache
def params(width):
  net, x = ResBlock(width), jnp.zeros((1, 4, 4, width))
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros((1, 32)))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: 0.05 * rng.normal(size=s.shape).astype(np.float32),
    shapes['params'],
  )


@functools.cache
def made(zero, data, fsdp, kind='adam', width=64, **options):
  """(mesh, first state, compiled step, batch)."""
  options = {'accumulate': 1, 'dtype': 'float32'} | options
  net = ResBlock(width, dtype=jnp.dtype(options.pop('dtype')))
  mesh, tx = sharding.make_mesh(data, fsdp), optimizer(1e-2, kind=kind)
  init = functools.partial(init_state, tx=tx, ema_lengths=LENGTHS)
  shardings = state_shardings(jax.eval_shape(init, params(width)), mesh, zero)
  state = jax.jit(init, out_shardings=shardings)(params(width))
  step = jax.jit(
    make_train_step(
      loss_fn(net), tx, seed=0, ema_limit=0.9, zero=zero, **options
    ),
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  rng = np.random.default_rng(1)
  x = rng.normal(size=(ROWS, 4, 4, width)).astype(np.float32)
  emb = rng.normal(size=(ROWS, 32)).astype(np.float32)
  batch = sharding.put_batch({'x': x, 'y': x[::-1], 'emb': emb}, mesh)
  with jax.set_mesh(mesh):
    return mesh, state, step.lower(state, batch, {}).compile(), batch


def trained(*args, steps=3, **options):
  """(state, losses) after some steps."""
  mesh, state, step, batch = made(*args, **options)
  losses = []
  with jax.set_mesh(mesh):
    for _ in range(steps):
      state, metrics = step(state, batch, {})
      losses.append(metrics['loss'].item())
  return state, losses


@pytest.mark.parametrize(
  'data, fsdp, options',
  [
    (8, 1, {}),
    (4, 2, {}),
    (8, 1, {'dtype': 'bfloat16'}),
    (4, 2, {'accumulate': 2}),
    (4, 2, {'kind': 'adafactor', 'width': 128}),
    (4, 2, {'kind': 'muon'}),
    (1, 1, {}),
  ],
)
def test_training_is_the_same_up_to_rounding(data, fsdp, options):
  whole, losses = trained(False, data, fsdp, **options)
  parts, found = trained(True, data, fsdp, **options)
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-9)


@pytest.mark.parametrize('data, fsdp', [(8, 1), (4, 2)])
def test_each_device_holds_its_part_of_the_state_before_and_after(data, fsdp):
  (_, first, *_), (last, _) = made(True, data, fsdp), trained(True, data, fsdp)
  for state in first, last:
    kernel = lambda tree: tree['conv1']['kernel'].addressable_shards
    whole = params(64)['conv1']['kernel'].nbytes
    moments = state.opt_state[1][0]
    for tree in state.ema_params, state.emas['0.1'], moments.mu, moments.nu:
      assert {s.data.nbytes for s in kernel(tree)} == {whole // 8}
    assert {s.data.nbytes for s in kernel(state.params)} == {whole // fsdp}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('fsdp', [1, 2])
def test_gradients_are_scattered_and_parameters_gathered_once(fsdp, dtype):
  """Two kernels of 3 · 3 · 64 · 64; all else is too small to be split."""
  kernels = 2 * 4 * 3 * 3 * 64 * 64
  found = collectives(made(True, 8 // fsdp, fsdp, dtype=dtype)[2].as_text())
  # New parameters over `data`; where they are used, over `fsdp`.
  gathered = {1: (2, kernels), 2: (4, kernels // 2 + kernels)}
  scattered = {1: (2, kernels // 8), 2: (4, kernels // 4 + kernels // 8)}
  assert found['all-gather'] == gathered[fsdp]
  assert found['reduce-scatter'] == scattered[fsdp]
  assert found['all-reduce'][1] < kernels / 4
  plain = made(False, 8 // fsdp, fsdp, dtype=dtype)[2].as_text()
  assert collectives(plain)['all-reduce'][1] > kernels
  assert 'reduce-scatter' not in collectives(plain)


def test_the_planner_counts_the_parts_that_devices_hold():
  mesh, state, *_ = made(True, 4, 2)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  for name, axes in ('params', 'SPLIT'), ('ema_params', 'ZERO'):
    tree = getattr(state, name)
    mine = analytic.tree_bytes(
      tree, analytic.abstract_mesh(4, 2), getattr(sharding, axes)
    )
    assert mine == device_bytes(tree, getattr(shardings, name))


def test_a_checkpoint_is_resumed_with_and_without_and_on_other_meshes(tmp_path):
  saved, _ = trained(True, 4, 2)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(3, saved, wait=True)
    for zero, data, fsdp in (False, 4, 2), (True, 8, 1), (True, 2, 4):
      mesh = sharding.make_mesh(data, fsdp)
      shapes = jax.eval_shape(lambda: saved)
      placed = state_shardings(shapes, mesh, zero)
      abstract = sharding.with_shardings(shapes, placed)
      state, _, step = checkpoints.restore(abstract)
      assert step == 3
      assert jax.tree.map(lambda x: x.sharding, state) == placed
      jax.tree.map(np.testing.assert_array_equal, state, saved)


def test_replicas_of_parameters_are_still_compared():
  mesh, state, *_ = made(True, 4, 2)
  replicas.check(state, mesh, 1)
  assert replicas.checksums(state, mesh).shape == (4, 2, 2)


def test_what_is_split_for_zero_is_a_part_of_the_parameters_part():
  mesh = sharding.make_mesh(4, 2)
  spec = lambda *shape, **options: tuple(
    sharding.leaf_sharding(jnp.zeros(shape), mesh, **options).spec
  )
  zero = functools.partial(spec, axes=sharding.ZERO, min_size=1)
  assert zero(3, 3, 64, 128) == (None, None, None, ('fsdp', 'data'))
  assert zero(3, 3, 64, 64) == (None, None, 'data', 'fsdp')
  assert zero(8, 3, 3, 6, 6) == ('data', None, None, None, 'fsdp')
  assert zero(3, 4) == (None, 'fsdp')
  # Neither the whole array nor its part is too small.
  half = functools.partial(spec, axes=sharding.ZERO, min_size=64 * 64)
  assert half(64, 64) == (None, 'fsdp')
