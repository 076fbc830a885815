"""A user's weights for a scoring network, checked by name and shape.

Read from safetensors or npz, never unpickled.
"""

import functools
import os
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.errors import ModelError
from imagen_jax.io import files, safetensors


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], str]:
  """({name: array}, sha256) of a safetensors or npz file.

  Raises:
    ModelError: another kind of file, or one that cannot be read.
  """
  path = pathlib.Path(path)
  if path.suffix not in ('.safetensors', '.npz'):
    raise ModelError(
      f'{path} is no .safetensors or .npz file; other formats may run code '
      'when they are read: convert it with a tool that you trust.'
    )
  try:
    digest = files.digest(path)['sha256']
    if path.suffix == '.npz':
      with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}, digest
    opened = safetensors.open_file(path)
    return {name: tensor.read() for name, tensor in opened.items()}, digest
  except (OSError, ValueError, TypeError) as error:
    raise ModelError(
      f'{path} cannot be read ({error}); copy it again from where it came.'
    ) from error


def with_weights(
  module: nn.Module,
  example: typing.Any,
  tensors: Mapping[str, np.ndarray],
  path: str | os.PathLike,
  *,
  ignored: Sequence[str] = (),
) -> Callable[[np.ndarray], jax.Array]:
  """A module with a file's weights as its float32 parameters, compiled.

  Args:
    module: Flax module whose parameters have flat, dotted names.
    example: an input array of the module, or its shape and dtype.
    tensors: from `read_tensors`.
    path: of their file, for the message.
    ignored: prefixes and suffixes of names that the module does not need.

  Raises:
    ModelError: a tensor is missing, unknown, or of another shape; the message
      names the first.
  """
  shapes = jax.eval_shape(module.init, jax.random.key(0), example)['params']
  for name, shape in shapes.items():
    if name not in tensors:
      raise ModelError(
        f'{path} has no tensor {name}; it holds the weights of another network.'
      )
    if tensors[name].shape != shape.shape:
      raise ModelError(
        f'{path}: tensor {name} has shape {tensors[name].shape} and '
        f'{shape.shape} is needed; it holds the weights of another network.'
      )
  for name in tensors.keys() - shapes.keys():
    if not any(name.startswith(x) or name.endswith(x) for x in ignored):
      raise ModelError(
        f'{path} has a tensor {name}, which {type(module).__name__} does not '
        'use; it holds the weights of another network.'
      )
  params = {name: jnp.asarray(tensors[name], jnp.float32) for name in shapes}
  return functools.partial(jax.jit(module.apply), {'params': params})
