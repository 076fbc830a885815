"""Folders in Hugging Face layout: JSON and safetensors, nothing unpickled.

safetensors is read and written here without its library, whose numpy side
knows bfloat16 only in its latest versions and writes a file in one piece. The
format is a length, a JSON header and the bytes: opening reads the header, and
then tensors come and go one at a time, however large the file.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from imagen_jax.errors import ModelError

DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
  """A tensor that is on disk until `read()` returns it as a numpy array."""

  dtype: np.dtype
  shape: tuple
  read: Callable


def read_json(path, what):
  """A JSON object as a dictionary.

  Args:
    path: the file.
    what: for the message, what the folder should be and what it should hold.

  Raises:
    ModelError: the file is missing or holds no JSON object.
  """
  path = pathlib.Path(path)
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ModelError(f'{path} does not exist; {what}.') from None
  except (OSError, ValueError, RecursionError) as error:
    raise ModelError(
      f'{path} cannot be read as JSON ({error}); download it again.'
    ) from None
  if not isinstance(value, dict):
    raise ModelError(f'{path} holds no JSON object; download it again.')
  return value


def open_tensors(folder, stem, *, what, convert):
  """{name: `Tensor`} over a folder's weights; no data is read yet.

  The weights are `stem.safetensors`, or shards listed in
  `stem.safetensors.index.json`; where a folder has neither, its one variant,
  such as `stem.fp16.safetensors`.

  Args:
    folder: in Hugging Face layout.
    stem: 'model' for transformers, 'diffusion_pytorch_model' for diffusers.
    what: see `read_json`.
    convert: how a pickled model becomes safetensors, for the message.

  Raises:
    ModelError: there are no weights, only pickled ones, or damaged ones.
  """
  folder = pathlib.Path(folder)
  single = f'{stem}.safetensors'
  index = f'{stem}.safetensors.index.json'
  variants = sorted(folder.glob(f'{stem}.*.safetensors')) + sorted(
    folder.glob(f'{stem}.safetensors.index.*.json')
  )
  if (folder / single).exists():
    found = folder / single
  elif (folder / index).exists():
    found = folder / index
  elif len(variants) == 1:
    found = variants[0]
  elif variants:
    names = ', '.join(path.name for path in variants)
    raise ModelError(
      f'{folder} holds several variants of its weights ({names}); keep one of '
      'them.'
    )
  else:
    pickled = sorted(folder.glob('*.bin')) + sorted(folder.glob('*.pt'))
    if pickled:
      raise ModelError(
        f'{pickled[0]} is a pickle, which can run code and is never read; '
        'download the safetensors version of this model, or convert it with '
        f'{convert}.'
      )
    raise ModelError(f'{folder} holds neither {single} nor {index}; {what}.')
  if found.suffix == '.safetensors':
    return open_file(found)
  files = read_json(found, what).get('weight_map', {})
  tensors = {}
  for file in sorted(set(files.values())):
    if not (folder / file).exists():
      raise ModelError(
        f'{folder / file}, named in {found.name}, does not exist; the download '
        'is incomplete: download the folder again.'
      )
    tensors |= open_file(folder / file)
  return tensors


def open_file(path):
  """{name: `Tensor`} of one file, its layout checked and no data read.

  Raises:
    ModelError: the file is no safetensors, or cut short.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
    with path.open('rb') as file:
      length = int.from_bytes(file.read(8), 'little')
      if not 2 <= length <= min(size - 8, 100_000_000):
        raise ValueError('no safetensors header')
      header = json.loads(file.read(length))
    start = 8 + length
    tensors = {}
    for name, entry in header.items():
      if name == '__metadata__':
        continue
      if entry['dtype'] not in DTYPES:
        raise ValueError(f'tensor {name!r} is of type {entry["dtype"]}')
      dtype = np.dtype(DTYPES[entry['dtype']])
      shape = tuple(entry['shape'])
      begin, end = entry['data_offsets']
      if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f'tensor {name!r} does not fill its place')
      if start + end > size:
        raise ValueError(f'it ends before tensor {name!r} does')
      read = _reader(path, dtype, shape, start + begin)
      tensors[name] = Tensor(dtype, shape, read)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ModelError(
      f'{path} cannot be read as safetensors ({error}); the file is damaged '
      'or incomplete: download it again.'
    ) from None
  return tensors


def _reader(path, dtype, shape, offset):
  def read():
    if not math.prod(shape):
      return np.zeros(shape, dtype)
    # bfloat16 is no type of numpy's own, so bytes are read and viewed. Not
    # mapped: pages of a mapped file count as this process's memory.
    raw = np.fromfile(
      path, np.uint8, math.prod(shape) * dtype.itemsize, offset=offset
    )
    return raw.view(dtype).reshape(shape)

  return read


def write_file(path, tensors):
  """Writes tensors one after the other, never two of them in memory.

  Args:
    path: the file.
    tensors: {name: `Tensor`}; the file holds them in the order of the names.

  Raises:
    ModelError: the file cannot be written.
  """
  path = pathlib.Path(path)
  # transformers takes files without this mark for TensorFlow's or refuses.
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name in sorted(tensors):
    tensor = tensors[name]
    begin = end
    end += math.prod(tensor.shape) * tensor.dtype.itemsize
    header[name] = {
      'dtype': NAMES[np.dtype(tensor.dtype)],
      'shape': list(tensor.shape),
      'data_offsets': [begin, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # the data begins at a multiple of 8
  temporary = path.with_name(f'.{path.name}.part')
  try:
    with temporary.open('wb') as file:
      file.write(len(text).to_bytes(8, 'little') + text)
      for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name].read())
        file.write(array.reshape(-1).view(np.uint8))
    temporary.replace(path)
  except OSError as error:
    raise ModelError(
      f'{path} could not be written ({error.strerror or error}); check space '
      'and permissions.'
    ) from error
  finally:
    temporary.unlink(missing_ok=True)
