"""Checkpoints are restored bit for bit, or named and skipped."""

import errno
import json
import os
import pathlib
import random
import shutil
import warnings
from unittest import mock

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax import sharding
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import manifest, steps
from imagen_jax.io.checkpoint import Checkpoints

MANIFEST = manifest.NAME


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  ema_params: dict
  opt_state: optax.OptState
  key: jax.Array
  count: int


def fresh(seed=0):
  kernel = jax.random.normal(jax.random.key(seed), (24, 128))
  params = {
    'down_0': {'kernel': kernel, 'bias': jnp.full((3,), jnp.nan)},
    'half': jnp.linspace(0, 1, 5, dtype=jnp.bfloat16),
  }
  return State(
    step=jnp.int32(seed),
    params=params,
    ema_params=jax.tree.map(lambda x: x + 1, params),
    opt_state=optax.adam(1e-3).init(params),
    key=jax.random.key(seed),
    count=7,
  )


def place(state, mesh):
  abstract = jax.eval_shape(lambda: state)
  shardings = sharding.state_shardings(abstract, mesh, min_size=1)
  abstract = sharding.with_shardings(abstract, shardings)
  return jax.device_put(state, shardings), abstract


def same_bits(a, b):
  def bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    return np.asarray(x).tobytes()

  assert jax.tree.structure(a) == jax.tree.structure(b)
  return [bits(jnp.asarray(x)) for x in jax.tree.leaves(a)] == [
    bits(jnp.asarray(x)) for x in jax.tree.leaves(b)
  ]


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """Checkpoints of steps 100 and 200; tests that damage them use `copy`."""
  directory = tmp_path_factory.mktemp('two') / 'checkpoints'
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(100, fresh(1), {'data_step': 100})
    checkpoints.save(200, fresh(2), {'data_step': 200})
  return directory


@pytest.fixture
def copy(two_steps, tmp_path):
  return pathlib.Path(shutil.copytree(two_steps, tmp_path / 'checkpoints'))


def files(directory):
  return sorted(p for p in directory.rglob('*') if p.is_file())


def restore(directory, **options):
  with mock.patch.object(steps._log, 'warning') as warning:
    with Checkpoints(directory) as checkpoints:
      result = checkpoints.restore(jax.eval_shape(lambda: fresh()), **options)
  return *result, [c.args[0] % c.args[1:] for c in warning.mock_calls]


def test_a_state_comes_back_bit_for_bit_with_its_extra(two_steps):
  state, extra, step, warnings = restore(two_steps)
  assert (step, extra, warnings) == (200, {'data_step': 200}, [])
  assert same_bits(state, fresh(2))
  assert state.key.dtype == fresh(2).key.dtype
  state, extra, step, _ = restore(two_steps, step=100)
  assert (step, extra) == (100, {'data_step': 100})
  assert same_bits(state, fresh(1))


def test_a_branch_without_arrays_need_not_have_been_saved(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(5, {'w': jnp.ones(3)})
    wanted = {'w': jnp.zeros(3), 'emas': {}}
    state, _, _ = checkpoints.restore(wanted)
    assert state['emas'] == {} and state['w'].all()
    checkpoints.save(6, state)
    assert checkpoints.restore({'w': jnp.zeros(3)})[0]['w'].all()


@pytest.mark.parametrize('sizes', [(2, 4), (8, 1), (1, 1), (1, 2)])
def test_a_state_comes_back_onto_another_mesh(tmp_path, sizes):
  state, _ = place(fresh(3), sharding.make_mesh(1, 8))
  assert not state.params['down_0']['kernel'].is_fully_replicated
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(5, state)
    _, abstract = place(fresh(3), sharding.make_mesh(*sizes))
    restored, _, _ = checkpoints.restore(abstract)
  assert same_bits(restored, fresh(3))
  wanted = jax.tree.map(lambda x: x.sharding, abstract)
  assert jax.tree.map(lambda x: x.sharding, restored) == wanted


def test_the_buffers_may_be_donated_while_the_save_is_under_way(tmp_path):
  step = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
  )
  # Compile first, so that the step overwrites the buffers without delay.
  jax.block_until_ready(step({'w': jnp.zeros((512, 512))}))
  state = {'w': jnp.arange(512 * 512.0).reshape(512, 512)}
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, state)
    state = jax.block_until_ready(step(step(state)))
    abstract = jax.eval_shape(lambda: state)
    restored, _, _ = checkpoints.restore(abstract)
  expected = np.arange(512 * 512.0).reshape(512, 512)
  np.testing.assert_array_equal(restored['w'], expected)


def test_a_part_is_read_without_the_rest(copy):
  with Checkpoints(copy) as checkpoints:
    tree, extra, step = checkpoints.restore_subtree('ema_params')
    assert (step, extra) == (200, {'data_step': 200})
    assert same_bits(tree, fresh(2).ema_params)
    assert isinstance(tree['down_0']['kernel'], np.ndarray)
    with pytest.raises(ModelError, match='opt_state'):
      checkpoints.restore_subtree('model')


def flip(path, generator):
  raw = bytearray(path.read_bytes())
  bit = generator.randrange(8 * len(raw))
  raw[bit // 8] ^= 1 << bit % 8
  path.write_bytes(raw)
  return bit


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'delete'])
def test_damage_of_any_file_is_noticed_and_the_file_named(copy, damage):
  generator = random.Random(0)
  hurt = {
    'flip': lambda path: flip(path, generator),
    'truncate': lambda path: path.write_bytes(path.read_bytes()[:-1]),
    'delete': lambda path: path.unlink(),
  }[damage]
  with Checkpoints(copy) as checkpoints:
    checkpoints.verify(200)
    for path in 3 * files(copy / '200'):
      whole = path.read_bytes()
      hurt(path)
      gone = damage == 'delete' and path.name == MANIFEST
      with pytest.raises(ModelError, match='200' if gone else path.name):
        checkpoints.verify(200)
      path.write_bytes(whole)
    checkpoints.verify(200)


@pytest.mark.slow
def test_a_thousand_damages_are_all_noticed(copy):
  generator = random.Random(1)
  with Checkpoints(copy) as checkpoints:
    for i in range(1000):
      path = generator.choice(files(copy / '200'))
      whole = path.read_bytes()
      if i % 10 == 0:
        path.unlink()
      elif i % 10 == 1:
        path.write_bytes(whole[: generator.randrange(len(whole))])
      else:
        flip(path, generator)
      with pytest.raises(ModelError):
        checkpoints.verify(200)
      path.write_bytes(whole)
    checkpoints.verify(200)


def test_a_flipped_bit_of_the_manifest_is_noticed(copy):
  path = copy / '200' / MANIFEST
  whole = path.read_bytes()
  for i in random.Random(2).sample(range(8 * len(whole)), 300):
    raw = bytearray(whole)
    raw[i // 8] ^= 1 << i % 8
    path.write_bytes(raw)
    with pytest.raises(manifest.Damaged):
      manifest.read(copy / '200')
  path.write_bytes(whole)
  manifest.read(copy / '200')


def test_a_damaged_step_is_named_and_the_one_before_restored(copy):
  largest = max(files(copy / '200'), key=lambda p: p.stat().st_size)
  flip(largest, random.Random(3))
  state, extra, step, warnings = restore(copy)
  assert (step, extra) == (100, {'data_step': 100})
  assert same_bits(state, fresh(1))
  assert len(warnings) == 1 and '\n' not in warnings[0]
  assert '200' in warnings[0] and largest.name in warnings[0]
  with pytest.raises(ModelError, match=largest.name):
    restore(copy, step=200)


def test_a_half_written_step_is_no_step(copy):
  (copy / '200' / MANIFEST).unlink()
  shutil.copytree(copy / '200', copy / '300.orbax-checkpoint-tmp')
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.all_steps() == [100]
    assert checkpoints.latest_step() == 100
  _, _, step, warnings = restore(copy)
  assert step == 100 and '200' in warnings[0]


def test_when_no_step_is_good_the_directory_is_named(copy, tmp_path):
  for step in ['100', '200']:
    (copy / step / 'state' / '_METADATA').unlink()
  with pytest.raises(ModelError, match=str(copy)):
    restore(copy)
  with pytest.raises(ModelError, match='nothing'):
    restore(tmp_path / 'nothing')


def test_a_step_under_another_name_is_not_that_step(copy):
  (copy / '200').rename(copy / '400')
  _, _, step, warnings = restore(copy)
  assert step == 100 and '400' in warnings[0]


def test_a_newer_format_is_refused_rather_than_skipped(copy):
  path = copy / '200' / MANIFEST
  body = json.loads(path.read_text())
  body['format_version'] = 2
  del body['digest']
  digest = manifest._self_digest(body)
  path.write_text(manifest._text({**body, 'digest': digest}))
  with pytest.raises(ModelError, match=MANIFEST) as caught:
    restore(copy)
  assert not isinstance(caught.value, manifest.Damaged)


def test_another_models_state_is_refused_naming_the_leaf(two_steps):
  def attempt(**changes):
    state = jax.eval_shape(lambda: fresh().replace(**changes))
    with Checkpoints(two_steps) as checkpoints:
      checkpoints.restore(state)

  with pytest.raises(ModelError, match=r'step .*int32\[2\]'):
    attempt(step=jnp.zeros(2, jnp.int32))
  with pytest.raises(ModelError, match=r'step .*float32\[\]'):
    attempt(step=jnp.float32(0))
  with pytest.raises(ModelError, match='params/down_0/bias'):
    attempt(params={'half': fresh().params['half']})


def test_the_last_and_every_nth_step_are_kept(tmp_path):
  directory = tmp_path / 'c'
  with Checkpoints(directory, keep_last=2, keep_every=30) as checkpoints:
    for step in range(10, 80, 10):
      checkpoints.save(step, {'w': jnp.zeros(3)})
    checkpoints.wait()
    assert checkpoints.all_steps() == [30, 60, 70]
  assert {p.name for p in directory.iterdir()} == {'30', '60', '70'}
  with pytest.raises(UsageError, match='train.keep_last'):
    Checkpoints(directory, keep_last=0)


def test_damaged_steps_do_not_count_among_the_last(copy):
  (copy / '200' / 'state' / '_METADATA').unlink()
  with Checkpoints(copy, keep_last=2) as checkpoints:
    state, _, _ = checkpoints.restore(jax.eval_shape(lambda: fresh()))
    checkpoints.save(150, state)
    checkpoints.wait()
    assert checkpoints.all_steps() == [100, 150]


def test_a_damaged_or_half_written_step_is_written_again(copy):
  (copy / '200' / 'state' / '_METADATA').unlink()
  (copy / '300').mkdir()
  (copy / '250.orbax-checkpoint-tmp').mkdir()
  with Checkpoints(copy) as checkpoints:
    state, _, step = checkpoints.restore(jax.eval_shape(lambda: fresh()))
    assert step == 100
    checkpoints.save(200, fresh(5))
    checkpoints.save(300, fresh(6))
    checkpoints.wait()
    assert checkpoints.all_steps() == [100, 200, 300]
  assert {p.name for p in copy.iterdir()} == {'100', '200', '300'}
  assert same_bits(restore(copy, step=200)[0], fresh(5))


def test_a_good_step_is_never_overwritten(copy):
  with Checkpoints(copy) as checkpoints:
    for step in [150, 200]:
      with pytest.raises(ModelError, match='200'):
        checkpoints.save(step, fresh(9))
  assert same_bits(restore(copy)[0], fresh(2))


def test_saving_the_same_step_twice_in_a_row_is_saving_it_once(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, {'w': jnp.zeros(3)})
    checkpoints.save(1, {'w': jnp.ones(3)}, wait=True)
    tree, _, _ = checkpoints.restore_subtree('w')
  np.testing.assert_array_equal(tree, np.zeros(3))


def test_a_save_that_fails_is_named_and_the_last_step_stays(copy, monkeypatch):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with Checkpoints(copy) as checkpoints:
    monkeypatch.setattr(manifest, 'write', full)
    checkpoints.save(300, fresh(3))
    with pytest.raises(ModelError, match='300'):
      checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.latest_step() == 200
    checkpoints.save(400, fresh(4), wait=True)
    assert checkpoints.latest_step() == 400


async def async_serialize_from_host():
  pass


def test_a_directory_that_cannot_be_made_is_named_without_warnings(tmp_path):
  (tmp_path / 'file').write_text('')
  with warnings.catch_warnings(record=True, action='always') as heard:
    with Checkpoints(tmp_path / 'file' / 'c') as checkpoints:
      with pytest.raises(ModelError, match='c/1'):
        checkpoints.save(1, {'w': jnp.zeros(3)}, wait=True)
    async_serialize_from_host()  # like orbax's writes that have not begun
  assert not heard


def test_restoring_prints_nothing(two_steps, caplog, capfd):
  restore(two_steps)
  with Checkpoints(two_steps) as checkpoints:
    checkpoints.restore_subtree('params')
  assert caplog.text == '' and capfd.readouterr() == ('', '')


def test_a_relative_directory_works(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with Checkpoints('run/checkpoints') as checkpoints:
    checkpoints.save(1, {'a': np.ones(3, np.float32)}, wait=True)
  with Checkpoints('run/checkpoints') as checkpoints:
    tree, _, step = checkpoints.restore({'a': np.zeros(3, np.float32)})
  assert step == 1 and float(tree['a'].sum()) == 3
