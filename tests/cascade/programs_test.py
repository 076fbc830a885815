"""Compiled programs on disk: used where they belong, made anew elsewhere."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import imagen_jax
from imagen_jax import sharding
from imagen_jax.cascade import programs
from imagen_jax.cascade.programs import Program
from imagen_jax.cascade.stage_run import StageRun

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)


def function(tree):
  x = tree['x']
  for _ in range(3):
    x = jnp.tanh(x @ x.T) * 2 + jnp.where(x > 0, x, 0)
  return {'x': x}


def traced(tree):
  raise AssertionError('it is traced')


@pytest.fixture
def run(programs_folder):
  """Calls a new `Program` of a function; the result and the number of files."""

  def run(function, identity='f', devices=1):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    placed = jax.device_put({'x': X}, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
      result = Program(function, identity)(placed)
    return np.asarray(result['x']), len(list(programs_folder.iterdir()))

  return run


@pytest.fixture
def setting():
  """Sets an option of jax until the end of the test."""
  before = {}

  def set_option(name, value):
    before.setdefault(name, jax.config.values[name])
    jax.config.update(name, value)

  yield set_option
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize('devices', [1, 8])
def test_a_kept_program_is_run_without_tracing(run, devices):
  first, files = run(function, devices=devices)
  assert files == 1
  again, files = run(traced, devices=devices)
  np.testing.assert_array_equal(first, again)
  np.testing.assert_allclose(first, function({'x': X})['x'], atol=1e-5)


def test_one_that_was_in_jaxs_cache_can_be_kept(run, setting):
  """XLA's CPU compiler does not write a program again that it has read."""
  setting('jax_persistent_cache_min_compile_time_secs', 0)
  right, _ = run(function, identity=None)
  jax.clear_caches()
  run(function)
  again, _ = run(traced)
  np.testing.assert_allclose(again, right, atol=1e-6)


@pytest.mark.parametrize(
  'change',
  [
    lambda data: data[: programs.LENGTH],
    lambda data: data[:-1],
    lambda data: b'X' + data[1:],
    *(
      (lambda data, i=i: data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
      for i in (25, 60, -1000)
    ),
  ],
)
def test_a_damaged_one_is_made_anew(run, programs_folder, change):
  first, _ = run(function)
  (file,) = programs_folder.iterdir()
  whole = file.read_bytes()
  file.write_bytes(change(whole))
  again, files = run(function)
  assert files == 1
  np.testing.assert_array_equal(first, again)
  run(traced)  # it was written again


@pytest.mark.parametrize('what', ['_machine', '_code', 'identity', 'devices'])
def test_one_of_another_machine_code_or_function_is_not_run(
  run, programs_folder, monkeypatch, what
):
  run(function)
  (file,) = programs_folder.iterdir()
  identity, devices = 'f', 1
  if what == 'identity':
    identity = 'g'
  elif what == 'devices':
    devices = 2
  else:
    monkeypatch.setattr(programs, what, lambda *_: 'another')
  with pytest.raises(AssertionError, match='traced'):
    run(traced, identity, devices)
  run(function, identity, devices)
  (other,) = set(programs_folder.iterdir()) - {file}
  os.replace(file, other)  # as if its name were that of the other
  with pytest.raises(AssertionError, match='traced'):
    run(traced, identity, devices)


def test_code_that_changed_since_the_process_began_is_not_kept(
  run, monkeypatch
):
  """The process runs what it has imported."""
  monkeypatch.setattr(programs, 'BEGAN', 0.0)
  programs._code.cache_clear()
  assert run(function)[1] == 0
  programs._code.cache_clear()


def test_another_precision_of_products_is_another_program(run):
  run(function)
  with jax.default_matmul_precision('float32'):
    with pytest.raises(AssertionError, match='traced'):
      run(traced)
    assert run(function)[1] == 2
  run(traced)  # the first one


def test_a_program_whose_use_cannot_be_noted_is_run(run, monkeypatch):
  run(function)
  monkeypatch.setattr(os, 'utime', raises(OSError(errno.EROFS, 'read-only')))
  run(traced)


def raises(error):
  def call(*args, **kwargs):
    raise error

  return call


def test_without_an_identity_nothing_is_kept(run):
  assert run(function, identity=None)[1] == 0


def test_where_nothing_can_be_written_it_is_compiled(
  run, programs_folder, monkeypatch
):
  monkeypatch.setattr(
    programs, 'find_folder', lambda: programs_folder / 'missing'
  )
  result, _ = run(function)
  np.testing.assert_allclose(result, function({'x': X})['x'], atol=1e-5)


def test_the_longest_unused_are_removed(run, programs_folder, monkeypatch):
  monkeypatch.setattr(programs, 'MOST', 2)
  for second, name in enumerate('ab'):
    run(function, name)
    newest = max(
      programs_folder.iterdir(), key=lambda path: path.stat().st_ctime_ns
    )
    os.utime(newest, (second, second))
  run(traced, 'a')  # is used
  run(function, 'c')
  run(traced, 'a')
  with pytest.raises(AssertionError, match='traced'):
    run(traced, 'b')


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, setting):
  setting('jax_compilation_cache_dir', str(tmp_path))
  kept = tmp_path / programs.FOLDER
  assert programs.find_folder() == kept
  kept.chmod(0o777)
  assert programs.find_folder() is None
  kept.chmod(0o700)
  setting('jax_enable_compilation_cache', False)
  assert programs.find_folder() is None
  setting('jax_enable_compilation_cache', True)
  setting('jax_compilation_cache_dir', 'gs://bucket/cache')
  assert programs.find_folder() is None


def test_stages_are_compiled_once_for_their_first_batch(model, monkeypatch):
  """What a stage prepares beforehand is what it then runs."""
  prepare, prepared = StageRun.prepare, []

  def noted(run, *args):
    prepare(run, *args)
    prepared.append(len(run.program))

  monkeypatch.setattr(StageRun, 'prepare', noted)
  cascade = imagen_jax.load(model)
  cascade.sample(['a red circle', 'a blue square'], batch_size=2, steps=3)
  runs = cascade._runs(cascade.settings(steps=3))
  assert prepared == [1] * (len(runs) - 1) != []
  assert [len(run.program) for run in runs] == [1] * len(runs)
