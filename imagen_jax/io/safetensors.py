"""Safetensors files, read and written one tensor at a time.

Reading uses the library, which nothing else imports: opening parses the header
and checks that the tensors fill the file; data are read on request. The
library's writer needs all tensors of a file in memory, so the writer here is
our own. It writes the same bytes.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from imagen_jax.errors import ModelError
from imagen_jax.io import files
from imagen_jax.io.files import AnyPath

# In the library's order: a file starts with the tensors of the last type.
DTYPES: dict[str, Any] = {
  'BOOL': np.bool_,
  'U8': np.uint8,
  'I8': np.int8,
  'I16': np.int16,
  'U16': np.uint16,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I32': np.int32,
  'U32': np.uint32,
  'F32': np.float32,
  'F64': np.float64,
  'I64': np.int64,
  'U64': np.uint64,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
  """A tensor whose data are read or computed by `read()`."""

  dtype: np.dtype[Any]
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


def open_file(path: AnyPath) -> dict[str, Tensor]:
  """{name: `Tensor`} of a file, sorted by name; no data are read yet.

  Raises:
    ModelError: the file is missing, not safetensors, or truncated. Reading a
      tensor may raise it as well.
  """
  try:
    # Not memory-mapped: mapped pages count as this process's memory.
    file = safetensors.safe_open(path, 'np', backend='pread')
    return {name: _tensor(path, file, name) for name in sorted(file.keys())}
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise _unreadable(path, error) from error


def _tensor(path: Any, file: Any, name: str) -> Tensor:
  view = file.get_slice(name)
  if view.get_dtype() not in DTYPES:
    raise ValueError(f'tensor {name!r} is of type {view.get_dtype()}')

  def read() -> np.ndarray:
    try:
      return file.get_tensor(name)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
      raise _unreadable(path, error) from error

  dtype = np.dtype(DTYPES[view.get_dtype()])
  return Tensor(dtype, tuple(view.get_shape()), read)


def _unreadable(path: Any, error: Exception) -> ModelError:
  return ModelError(
    f'{path} cannot be read as safetensors ({error}); the file is damaged or '
    f'incomplete: {files.COPY_AGAIN}.'
  )


def write_file(
  path: AnyPath,
  tensors: Mapping[str, Tensor],
  *,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors one at a time, with at most one in memory.

  Args:
    path: the file, written atomically.
    tensors: {name: `Tensor`}, in any order.
    metadata: of the file's header.

  Raises:
    ModelError: the file cannot be written.
  """
  rank = list(DTYPES).index
  kinds = {name: NAMES[np.dtype(t.dtype)] for name, t in tensors.items()}
  names = sorted(tensors, key=lambda name: (-rank(kinds[name]), name))
  header: dict[str, Any] = {'__metadata__': metadata} if metadata else {}
  end = 0
  for name in names:
    tensor, begin = tensors[name], end
    end += math.prod(tensor.shape) * tensor.dtype.itemsize
    header[name] = {
      'dtype': kinds[name],
      'shape': list(tensor.shape),
      'data_offsets': [begin, end],
    }
  compact = functools.partial(json.dumps, separators=(',', ':'))
  text = compact(header, ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)  # the data begin at a multiple of 8
  with files.replacing(path, error=ModelError) as temporary:
    with pathlib.Path(temporary).open('wb') as file:
      file.write(len(text).to_bytes(8, 'little') + text)
      for name in names:
        array = np.ascontiguousarray(tensors[name].read())
        file.write(array.reshape(-1).view(np.uint8).data)
