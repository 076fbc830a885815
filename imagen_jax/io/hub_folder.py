"""Folders in Hugging Face layout: JSON and safetensors, never pickles."""

import os
import pathlib
import re
from collections.abc import Callable, Collection

import ml_dtypes
import numpy as np

from imagen_jax.errors import ModelError
from imagen_jax.io import files, safetensors
from imagen_jax.io.files import AnyPath
from imagen_jax.io.safetensors import Tensor

# Without this, transformers takes a file for TensorFlow's, or rejects it.
METADATA = {'format': 'pt'}
AGAIN = 'download the folder again'
# A file of weights that is no shard, or an index of shards: .fp16.safetensors,
# .safetensors.index.fp16.json, but not .fp16-00001-of-00002.safetensors.
VARIANT = re.compile(
  r'(?!.*-\d+-of-\d+).*\.safetensors$|(?=.*\.safetensors).*\.index\b.*\.json$'
)
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def open_tensors(
  folder: AnyPath,
  stem: str,
  *,
  what: str,
  convert: str,
  used: Callable[[str], object] = bool,
) -> dict[str, Tensor]:
  """{name: `Tensor`} over a folder's weights; no data is read yet.

  The weights are `stem.safetensors`, or shards listed in
  `stem.safetensors.index.json`; if a folder has neither, its only variant, such
  as `stem.fp16.safetensors` or `stem.safetensors.index.fp16.json`.

  Args:
    folder: in Hugging Face layout.
    stem: 'model' for transformers, 'diffusion_pytorch_model' for diffusers.
    what: what the folder should be and hold, for the message.
    convert: how a pickled model becomes safetensors, for the message.
    used: whether a tensor is of interest, by its name; the others are left out
      and may be of any type.

  Raises:
    ModelError: there are no weights, or they are pickled, damaged, outside the
      folder, or not floating-point numbers.
  """
  folder = pathlib.Path(folder)
  found = _weights_file(folder, stem, what, convert)
  if found.suffix == '.safetensors':
    return _open_floats(found, used)
  tensors: dict[str, Tensor] = {}
  shards = _shards(found)
  for shard in sorted(set(shards.values())):
    if not os.path.isfile(shard):
      raise ModelError(
        f'{shard}, named in {found.name}, does not exist; the download is '
        f'incomplete: {AGAIN}.'
      )
    opened = _open_floats(shard, used)
    tensors |= {
      n: t for n, t in opened.items() if shards.get(n, shard) == shard
    }
  for name in filter(used, shards):
    if name not in tensors:
      raise ModelError(
        f'{shards[name]} lacks the tensor {name!r}, which {found.name} lists; '
        f'{AGAIN}.'
      )
  return tensors


def _shards(index: pathlib.Path) -> dict[str, pathlib.Path]:
  """{tensor: file} of an index.json."""
  listed = files.read_json(index, advice=AGAIN).get('weight_map')
  shards = {
    name: files.inside(index.parent, file)
    for name, file in (listed.items() if isinstance(listed, dict) else ())
  }
  found = {name: file for name, file in shards.items() if file is not None}
  if not found or len(found) < len(shards):
    raise ModelError(
      f'{index} does not map every tensor to a file in its folder; {AGAIN}.'
    )
  return found


def _weights_file(
  folder: pathlib.Path, stem: str, what: str, convert: str
) -> pathlib.Path:
  single = f'{stem}.safetensors'
  index = f'{single}.index.json'
  defaults = [folder / single, folder / index]
  variants = [
    path
    for path in sorted(folder.glob(f'{stem}.*'))
    if VARIANT.match(path.name, len(stem)) and path not in defaults
  ]
  for path in defaults:
    # Downloads of one variant may bring the index of another.
    lacks = variants and path.name == index and path.exists()
    if lacks and not any(map(os.path.isfile, _shards(path).values())):
      continue
    if path.exists():
      return path
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


def _open_floats(
  path: pathlib.Path, used: Callable[[str], object]
) -> dict[str, Tensor]:
  opened = safetensors.open_file(path)
  tensors = {name: opened[name] for name in filter(used, opened)}
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
