"""Mesh sizes, the sharding rule for a state, and batches on a mesh."""

import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from imagen_jax import collectives, sharding
from imagen_jax.errors import UsageError
from imagen_jax.nets.dense import Conv, Dense, DenseGeneral
from imagen_jax.nets.layers import ResBlock
from imagen_jax.nets.t5 import T5Encoder
from imagen_jax.planning import compile as planned
from imagen_jax.text import weights
from imagen_jax.text.encoder import encode_by_length, encode_tokens
from imagen_jax.training.step import half_gradients


def spec(shape, fsdp=4, **options):
  mesh = sharding.make_mesh(-1, fsdp)
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  return tuple(sharding.state_shardings(leaf, mesh, **options).spec)


def test_minus_one_is_the_rest_of_the_devices():
  assert dict(sharding.make_mesh().shape) == {'data': 8, 'fsdp': 1}
  assert dict(sharding.make_mesh(-1, 4).shape) == {'data': 2, 'fsdp': 4}
  assert dict(sharding.make_mesh(2, -1).shape) == {'data': 2, 'fsdp': 4}
  one = sharding.make_mesh(devices=jax.devices()[:1])
  assert dict(one.shape) == {'data': 1, 'fsdp': 1}


def test_a_single_process_may_use_fewer_devices_than_there_are():
  mesh = sharding.make_mesh(2, 2)
  assert list(mesh.devices.flat) == jax.devices()[:4]


def test_the_axes_are_auto_because_linen_supports_no_other():
  types = sharding.make_mesh().axis_types
  assert set(types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  ('data', 'fsdp'), [(-1, 3), (3, -1), (4, 4), (-1, -1), (0, 1), (-2, 1)]
)
def test_sizes_that_do_not_fit_the_devices_are_refused(data, fsdp):
  with pytest.raises(UsageError):
    sharding.make_mesh(data, fsdp)


def test_parameters_are_never_split_across_slices():
  devices = [
    types.SimpleNamespace(
      id=i, slice_index=i // 4, process_index=0, platform='cpu', device_kind='x'
    )
    for i in range(8)
  ]
  grid = sharding.device_grid(devices, 4, 2)
  assert grid.shape == (4, 2)
  for row in grid:
    assert len({device.slice_index for device in row}) == 1
  assert sorted(d.id for d in grid.flat) == list(range(8))
  with pytest.raises(UsageError, match='mesh.data'):
    sharding.device_grid(devices, 1, 8)


def test_an_axis_of_a_torus_may_be_split():
  devices = [
    types.SimpleNamespace(
      id=i,
      coords=coords,
      core_on_chip=0,
      process_index=i // 4,
      platform='tpu',
      device_kind='TPU v4',
    )
    for i, coords in enumerate(np.ndindex(4, 8, 8))
  ]
  grid = sharding.device_grid(devices, 128, 2)
  assert grid.shape == (128, 2)
  assert sorted(d.id for d in grid.flat) == list(range(256))
  for pair in grid:  # neighbours in a torus of 4 × 8 × 8 chips
    apart = np.abs(np.subtract(*(d.coords for d in pair)))
    assert np.minimum(apart, np.array([4, 8, 8]) - apart).sum() == 1


def test_the_largest_dimension_that_fsdp_divides_is_split():
  assert spec((3, 3, 64, 256)) == (None, None, None, 'fsdp')
  assert spec((3, 3, 256, 64)) == (None, None, 'fsdp')
  assert spec((3, 3, 256, 255)) == (None, None, 'fsdp')


def test_equal_dimensions_are_split_at_the_last():
  assert spec((256, 256)) == (None, 'fsdp')


def test_the_scan_axis_is_split_only_when_nothing_else_can_be():
  assert spec((1024, 3, 3, 64, 64)) == (None, None, None, None, 'fsdp')
  assert spec((4096, 6)) == ('fsdp',)


def test_small_and_indivisible_leaves_are_replicated():
  assert spec((127, 128)) == ()
  assert spec((127, 128), min_size=1) == (None, 'fsdp')
  assert spec((1001, 1001)) == ()
  assert spec(()) == ()


def test_one_fsdp_device_replicates_everything():
  assert spec((256, 256), fsdp=1) == ()


def test_a_state_takes_its_fraction_of_each_device():
  mesh = sharding.make_mesh(1, 8)
  tree = {'w': jnp.zeros((256, 512)), 'key': jax.random.key(0)}
  shardings = jax.device_put(tree, sharding.state_shardings(tree, mesh))
  fractions = {s.data.nbytes for s in shardings['w'].addressable_shards}
  assert fractions == {tree['w'].nbytes // 8}
  assert len(shardings['key'].sharding.device_set) == 8


def test_hosts_read_parts_of_copies_only(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  mesh = sharding.make_mesh(4, 2)

  def read(axes):
    leaf = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    place = sharding.leaf_sharding(leaf, mesh, min_size=1, axes=axes)
    (spread,) = sharding.spread([sharding.with_shardings(leaf, place)], 1)
    return tuple(spread.sharding.spec)

  assert read(sharding.SPLIT) == ('data', 'fsdp')
  assert read(sharding.ZERO) == (None, ('fsdp', 'data'))  # there are none


def test_a_batch_is_split_over_both_axes():
  mesh = sharding.make_mesh(2, 4)
  batch = {'image': np.arange(16 * 3).reshape(16, 3), 'mask': np.ones(16)}
  shardings = sharding.put_batch(batch, mesh)
  assert {s.data.shape for s in shardings['image'].addressable_shards} == {
    (2, 3)
  }
  np.testing.assert_array_equal(shardings['image'], batch['image'])


@pytest.mark.parametrize(
  'key, size, parts, near',
  [
    ('train.batch_size', 15, 1, '16.'),
    ('train.batch_size', 0, 1, '8.'),
    ('train.batch_size', 8, 2, '16.'),
    ('train.accumulate', 16, 0, '1.'),
  ],
)
def test_a_batch_that_cannot_be_split_is_refused_with_one_that_can(
  key, size, parts, near
):
  mesh = sharding.make_mesh(2, 4)
  sharding.check_batch_size(16, mesh, 2)
  with pytest.raises(UsageError) as caught:
    sharding.check_batch_size(size, mesh, parts)
  assert caught.value.key == f'config.{key}'
  assert str(caught.value).endswith(f' {near}')


def test_constrain_batch_splits_under_a_mesh_and_is_nothing_without():
  f = jax.jit(lambda: collectives.constrain_batch({'x': jnp.zeros((16, 3))}))
  assert len(f()['x'].sharding.device_set) == 1
  with jax.set_mesh(sharding.make_mesh(2, 4)):
    assert f()['x'].sharding.spec == PartitionSpec(('data', 'fsdp'))


def cpu_devices(call, **environment):
  code = (
    'import jax; from imagen_jax import sharding; '
    f'{call}; print(len(jax.devices()))'
  )
  env = {'PATH': '', 'JAX_PLATFORMS': 'cpu', **environment}
  out = subprocess.run(
    [sys.executable, '-c', code], env=env, capture_output=True, check=True
  )
  return int(out.stdout)


def test_set_cpu_devices_splits_the_cpu_before_the_start():
  assert cpu_devices('sharding.set_cpu_devices(3)') == 3


def test_set_cpu_devices_after_the_start_changes_nothing():
  late = 'jax.devices(); sharding.set_cpu_devices(3)'
  assert cpu_devices(late) == 1


@pytest.mark.slow
def test_set_cpu_devices_leaves_a_number_that_the_user_chose():
  flag = '--xla_force_host_platform_device_count=5'
  assert cpu_devices('sharding.set_cpu_devices(3)', XLA_FLAGS=flag) == 5
  assert (
    cpu_devices('sharding.set_cpu_devices(3)', JAX_NUM_CPU_DEVICES='4') == 4
  )


@pytest.mark.slow
def test_set_cpu_devices_gives_one_per_usable_core():
  cores = len(os.sched_getaffinity(0))
  assert cpu_devices('sharding.set_cpu_devices()') == cores


def test_parameters_are_split_over_as_few_devices_as_hold_them():
  assert sharding.least_split(10, 10, 8) == 1
  assert sharding.least_split(11, 10, 8) == 2
  assert sharding.least_split(30, 10, 6) == 3
  assert sharding.least_split(1000, 10, 8) == 8


def test_parameters_are_gathered_and_activations_stay():
  """Devices gather kernels and never another device's activations."""
  block = ResBlock(64)
  x, emb = jnp.zeros((16, 4, 4, 32)), jnp.zeros((16, 128))
  shapes = jax.eval_shape(block.init, jax.random.key(0), x, emb)
  mesh = sharding.make_mesh(2, 4)
  split = sharding.batch_sharding(mesh)

  def loss(params, x, emb):
    return jnp.sum(jnp.square(block.apply(params, x, emb)))

  with jax.set_mesh(mesh):
    text = (
      jax.jit(jax.grad(loss))
      .lower(
        sharding.with_shardings(shapes, sharding.state_shardings(shapes, mesh)),
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split),
        jax.ShapeDtypeStruct(emb.shape, emb.dtype, sharding=split),
      )
      .compile()
      .as_text()
    )
  gathered = re.findall(r'= f32\[([\d,]+)\]\S* all-gather\(', text)
  assert sorted(set(gathered)) == ['128,128', '3,3,32,64', '3,3,64,64']
  assert ' all-to-all(' not in text


def text_step(encode, data, fsdp):
  """A compiled encoding of 16 captions on data × fsdp devices."""
  net = T5Encoder(256, 128, 2, num_heads=4, head_dim=32, mlp_dim=256)
  mesh = sharding.make_mesh(data, fsdp)
  params = weights.abstract_params(net)
  place = sharding.state_shardings(params, mesh)
  rows = sharding.batch_sharding(mesh)
  ids, mask = (
    jax.ShapeDtypeStruct((16, 32), dtype, sharding=rows)
    for dtype in (jnp.int32, bool)
  )
  with jax.set_mesh(mesh):
    split = sharding.with_shardings(params, place)
    return (
      jax.jit(encode, static_argnums=0).lower(net, split, ids, mask).compile()
    )


def test_a_text_encoder_that_is_split_computes_no_more_than_a_whole_one():
  def flops(*mesh):
    return text_step(encode_tokens, *mesh).cost_analysis()['flops']

  assert flops(2, 4) < 1.1 * flops(8, 1)


@pytest.mark.parametrize('encode', [encode_tokens, encode_by_length])
def test_a_text_encoder_gathers_layers_and_sends_them_nowhere_else(encode):
  """Neither a layer nor the stack of all changes the axis that is split."""
  text = text_step(encode, 2, 4).as_text()
  gathered = re.findall(r'= f32\[([\d,]+)\]\S* all-gather\(', text)
  assert '128,256' in gathered and '256,128' in gathered
  # The tokens' rows of the table, and less than one of its matrices.
  assert planned.collectives(text).get('all-to-all', (0, 0))[1] < 4 * 128 * 128


def test_parameters_are_gathered_in_the_type_they_are_used_in():
  mesh = sharding.make_mesh(2, 4)
  w = jax.ShapeDtypeStruct((256, 512), jnp.float32)
  w = sharding.with_shardings(w, sharding.leaf_sharding(w, mesh))
  with jax.set_mesh(mesh):
    gather = jax.jit(lambda w: collectives.gather(w, jnp.bfloat16))
    text = gather.lower(w).compile().as_text()
  # CPU has no bfloat16 collectives, but each device casts its shard first.
  assert 'all-gather' in text and 'bf16[256,128]' in text


LAYERS = {
  'dense': (Dense(1, dtype=jnp.bfloat16), (8, 1)),
  'heads': (
    DenseGeneral((1, 1), axis=(-2, -1), dtype=jnp.bfloat16),
    (8, 1, 1),
  ),
  'conv': (Conv(1, (1, 1), dtype=jnp.bfloat16), (8, 1, 1, 1)),
}


def gradient_of_256_and_seven_ones(layer, shape, *, half=False):
  """The gradient of a layer's parameters, summed over eight devices."""
  weights = jnp.ones(shape[0]).at[0].set(256)

  def loss(params, key, x, frozen):
    y = layer.apply({'params': params['layer']}, x)
    return weights * y.astype(jnp.float32).reshape(-1), {}

  loss = half_gradients(loss) if half else loss
  mesh = sharding.make_mesh()
  x = jax.device_put(jnp.ones(shape), sharding.batch_sharding(mesh))
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)['params']
  params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total = lambda params: loss(params, jax.random.key(0), x, None)[0].sum()
  with jax.set_mesh(mesh):
    # Else a CPU, which has no bfloat16, may leave out the rounding to it.
    exact = {'xla_allow_excess_precision': False}
    gradient = jax.jit(jax.grad(total), compiler_options=exact)(
      {'layer': params}
    )['layer']
  assert {leaf.dtype for leaf in gradient.values()} == {jnp.dtype('float32')}
  return {name: leaf.item() for name, leaf in gradient.items()}


@pytest.mark.parametrize('name', LAYERS)
def test_gradients_are_summed_over_devices_in_float32(name):
  """256 and seven ones are 263; in bfloat16 264, or, one by one, 256."""
  found = gradient_of_256_and_seven_ones(*LAYERS[name])
  assert found == {'kernel': 263, 'bias': 263}


def test_half_gradients_of_kernels_are_summed_in_bfloat16():
  found = gradient_of_256_and_seven_ones(*LAYERS['dense'], half=True)
  assert found['kernel'] in (256, 264) and found['bias'] == 263
