"""Replicas are compared; one flipped bit names its device."""

import jax
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.errors import NumericError
from imagen_jax.training import loop, replicas
from tests import tiny_model

# A split array where fsdp > 1, two that are whole, and other types.
SHAPES = {
  'kernel': ((128, 256), np.float32),
  'scale': ((7,), np.float32),
  'half': ((3, 5), jax.numpy.bfloat16),
  'step': ((), np.int32),
}


def placed(mesh):
  rng = np.random.default_rng(0)
  tree = {
    name: np.asarray(100 * rng.normal(size=shape)).astype(dtype)
    for name, (shape, dtype) in SHAPES.items()
  }
  return jax.device_put(tree, sharding.state_shardings(tree, mesh))


def flipped(array, device, bit):
  """The array, with one bit of one device's copy flipped."""
  shards = []
  for shard in array.addressable_shards:
    data = np.array(shard.data)
    if shard.device == device:
      data.reshape(-1)[-1:].view(np.uint8)[bit // 8] ^= 1 << bit % 8
    shards.append(jax.device_put(data, shard.device))
  return jax.make_array_from_single_device_arrays(
    array.shape, array.sharding, shards
  )


@pytest.mark.parametrize('data,fsdp', [(8, 1), (4, 2)])
@pytest.mark.parametrize('name', SHAPES)
def test_a_flipped_bit_in_one_replica_names_its_device(data, fsdp, name):
  mesh = sharding.make_mesh(data, fsdp)
  state = placed(mesh)
  replicas.check(state, mesh, 1)
  device = mesh.devices[2, fsdp - 1]
  bits = 8 * np.dtype(SHAPES[name][1]).itemsize
  for bit in (0, bits - 1):
    state = placed(mesh)
    state[name] = flipped(state[name], device, bit)
    with pytest.raises(NumericError) as caught:
      replicas.check(state, mesh, 7)
    named = [d for d in mesh.devices.flat if f'{d} of' in str(caught.value)]
    assert named == [device]
    assert f'{device} of process 0' in str(caught.value)
    assert 'step 7' in str(caught.value)


def test_of_two_replicas_that_differ_both_are_named():
  mesh = sharding.make_mesh(2, 4)
  state = placed(mesh)
  state['kernel'] = flipped(state['kernel'], mesh.devices[0, 3], 5)
  with pytest.raises(NumericError, match='one of') as caught:
    replicas.check(state, mesh, 7)
  named = [d for d in mesh.devices.flat if f'{d} of' in str(caught.value)]
  assert named == list(mesh.devices[:, 3])


def test_arrays_without_a_replica_are_not_compared():
  mesh = sharding.make_mesh(1, 8)
  state = placed(mesh)
  state['kernel'] = flipped(state['kernel'], mesh.devices[0, 3], 5)
  replicas.check(state, mesh, 7)
  state['scale'] = flipped(state['scale'], mesh.devices[0, 3], 5)
  with pytest.raises(NumericError):
    replicas.check(state, mesh, 7)


def test_a_run_ends_before_it_saves_a_state_whose_replicas_differ(
  model, tmp_path, monkeypatch
):
  config = tiny_model.config(checkpoint_every=2, check_replicas_every=2)
  config.text.path = str(model / 'text')
  check, steps = replicas.check, []

  def broken(state, mesh, step):
    steps.append(step)
    if step == 4:
      leaves, tree = jax.tree.flatten(state)
      leaves[-3] = flipped(leaves[-3], mesh.devices[1, 0], 3)
      state = jax.tree.unflatten(tree, leaves)
    check(state, mesh, step)

  monkeypatch.setattr(replicas, 'check', broken)
  with pytest.raises(NumericError, match='step 4'):
    loop.train(config, tmp_path / 'w')
  assert steps == [2, 4]
  names = {path.name for path in (tmp_path / 'w' / 'checkpoints').iterdir()}
  assert '2' in names and '4' not in names
