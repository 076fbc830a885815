"""Folders in Hugging Face layout: JSON and safetensors, never pickles."""

import pathlib
from collections.abc import Collection

import ml_dtypes
import numpy as np

from imagen_jax.errors import ModelError
from imagen_jax.io import files, safetensors
from imagen_jax.io.files import AnyPath
from imagen_jax.io.safetensors import Tensor

# Without this, transformers takes a file for TensorFlow's, or rejects it.
METADATA = {'format': 'pt'}
AGAIN = 'download the folder again'
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def open_tensors(
  folder: AnyPath, stem: str, *, what: str, convert: str
) -> dict[str, Tensor]:
  """{name: `Tensor`} over a folder's weights; no data is read yet.

  The weights are `stem.safetensors`, or shards listed in
  `stem.safetensors.index.json`; if a folder has neither, its only variant, such
  as `stem.fp16.safetensors`.

  Args:
    folder: in Hugging Face layout.
    stem: 'model' for transformers, 'diffusion_pytorch_model' for diffusers.
    what: what the folder should be and hold, for the message.
    convert: how a pickled model becomes safetensors, for the message.

  Raises:
    ModelError: there are no weights, or they are pickled, damaged, or not
      floating-point numbers.
  """
  folder = pathlib.Path(folder)
  found = _weights_file(folder, stem, what, convert)
  if found.suffix == '.safetensors':
    return _open_floats(found)
  listed = files.read_json(found, advice=AGAIN).get('weight_map', {})
  tensors: dict[str, Tensor] = {}
  for file in sorted(set(listed.values())):
    if not (folder / file).exists():
      raise ModelError(
        f'{folder / file}, named in {found.name}, does not exist; the download '
        f'is incomplete: {AGAIN}.'
      )
    tensors |= _open_floats(folder / file)
  return tensors


def _weights_file(
  folder: pathlib.Path, stem: str, what: str, convert: str
) -> pathlib.Path:
  single = f'{stem}.safetensors'
  index = f'{single}.index.json'
  for name in (single, index):
    if (folder / name).exists():
      return folder / name
  variants = sorted(folder.glob(f'{stem}.*.safetensors'))
  variants += sorted(folder.glob(f'{single}.index.*.json'))
  if len(variants) == 1:
    return variants[0]
  if variants:
    names = ', '.join(path.name for path in variants)
    raise ModelError(
      f'{folder} holds several variants of its weights ({names}); keep one of '
      'them.'
    )
  pickled = sorted(folder.glob('*.bin')) + sorted(folder.glob('*.pt'))
  if pickled:
    raise ModelError(
      f'{pickled[0]} is a pickle, which can run code and is never read; '
      'download the safetensors version of this model, or convert it with '
      f'{convert}.'
    )
  raise ModelError(f'{folder} holds neither {single} nor {index}; {what}.')


def _open_floats(path: pathlib.Path) -> dict[str, Tensor]:
  tensors = safetensors.open_file(path)
  for name, tensor in tensors.items():
    if tensor.dtype not in FLOATS:
      raise ModelError(
        f'{path}: tensor {name!r} is of type {tensor.dtype}, not '
        f'floating-point; {AGAIN}.'
      )
  return tensors


def check_names(
  folder: pathlib.Path, given: Collection[str], wanted: Collection[str]
) -> None:
  """Checks that a folder has all tensors of a network and no others.

  Raises:
    ModelError: naming the first tensor that is unknown or missing.
  """
  for name in given:
    if name not in wanted:
      raise ModelError(
        f'{folder} holds a tensor {name!r} that its config.json does not '
        'describe; the weights and the config belong to different models.'
      )
  missing = [name for name in wanted if name not in given]
  if missing:
    raise ModelError(
      f'{folder} lacks the tensor {missing[0]!r}'
      + (f' and {len(missing) - 1} more' if missing[1:] else '')
      + f', which its config.json describes; {AGAIN}.'
    )


def read_shaped(
  folder: pathlib.Path, name: str, tensor: Tensor, shape: tuple[int, ...]
) -> np.ndarray:
  """Reads a tensor of a known shape.

  Raises:
    ModelError: it has another shape.
  """
  if tensor.shape != shape:
    raise ModelError(
      f'{folder}: tensor {name!r} has shape {tensor.shape}, and config.json '
      f'describes {shape}; the weights and the config belong to different '
      'models.'
    )
  return tensor.read()
