"""safetensors files, byte-equal to the library's; damaged files are named."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from imagen_jax.errors import ModelError
from imagen_jax.io import safetensors as own

RNG = np.random.default_rng(0)
TENSORS = {
  f'{name}/{shape}': RNG.integers(0, 2, shape).astype(dtype)
  for name, dtype in reversed(own.DTYPES.items())
  for shape in ((), (0, 3), (2, 3), (5,))
} | {'ü': RNG.normal(size=(4, 6)).T, 'half': np.ones(3, ml_dtypes.bfloat16)}


def in_memory(array):
  return own.Tensor(array.dtype, array.shape, lambda: array)


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'x.safetensors'
  own.write_file(path, {k: in_memory(v) for k, v in TENSORS.items()})
  return path


@pytest.mark.parametrize('metadata', [None, {'format': 'pt'}])
def test_the_bytes_written_are_the_librarys(tmp_path, metadata):
  path = tmp_path / 'x.safetensors'
  tensors = {k: in_memory(v) for k, v in TENSORS.items()}
  own.write_file(path, tensors, metadata=metadata)
  dense = {k: np.array(v, order='C') for k, v in TENSORS.items()}
  assert path.read_bytes() == safetensors.numpy.save(dense, metadata)


def test_tensors_come_back_to_the_bit_in_the_order_of_their_names(file):
  opened = own.open_file(file)
  assert list(opened) == sorted(TENSORS)
  for name, tensor in opened.items():
    array = tensor.read()
    assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape)
    assert array.dtype == TENSORS[name].dtype
    np.testing.assert_array_equal(array, TENSORS[name])


def test_opening_reads_no_data_and_later_damage_is_named(file):
  opened = own.open_file(file)
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ModelError, match='x.safetensors'):
    for tensor in opened.values():
      tensor.read()


@pytest.mark.parametrize(
  'spoil',
  [
    lambda raw: b'',
    lambda raw: b'{}',
    lambda raw: raw[:-1],
    lambda raw: raw + b'x',
    lambda raw: raw.replace(b'"F32"', b'"F99"', 1),
  ],
)
def test_a_damaged_file_is_named(file, spoil):
  file.write_bytes(spoil(file.read_bytes()))
  with pytest.raises(ModelError, match='x.safetensors'):
    own.open_file(file)


@pytest.mark.parametrize('shape', [[1] * 99, [0, 2**63], [0, 2**62, 8]])
def test_a_shape_that_numpy_lacks_is_named(tmp_path, shape):
  size = 4 * (0 not in shape)
  head = {'w': {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, size]}}
  text = json.dumps(head).encode()
  path = tmp_path / 'x.safetensors'
  path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(size))
  with pytest.raises(ModelError, match='x.safetensors'):
    own.open_file(path)['w'].read()


def test_a_type_that_numpy_lacks_is_named(tmp_path):
  path, array = tmp_path / 'x.safetensors', np.ones(3)
  array = array.astype(ml_dtypes.float8_e4m3fn)
  safetensors.numpy.save_file({'w': array}, path)
  with pytest.raises(ModelError, match='x.safetensors'):
    own.open_file(path)


def test_a_missing_file_and_a_place_that_cannot_be_written_are_named(tmp_path):
  with pytest.raises(ModelError, match='x.safetensors'):
    own.open_file(tmp_path / 'x.safetensors')
  (tmp_path / 'file').write_text('')
  with pytest.raises(ModelError, match='x.safetensors'):
    own.write_file(tmp_path / 'file' / 'x.safetensors', {})


def test_what_fails_while_writing_leaves_the_old_file(file):
  def fail():
    raise KeyboardInterrupt

  before = file.read_bytes()
  with pytest.raises(KeyboardInterrupt):
    own.write_file(file, {'a': own.Tensor(np.dtype('f4'), (3,), fail)})
  assert file.read_bytes() == before
  assert list(file.parent.iterdir()) == [file]
