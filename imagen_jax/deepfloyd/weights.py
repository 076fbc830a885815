"""Loads and saves diffusers' weights, one tensor at a time.

A Flax leaf's path is diffusers' dotted name in another notation:
`down_blocks.1.resnets.0.conv1.weight` is down_blocks_1/resnets_0/conv1/kernel.
Matrices are transposed and convolutions permuted from OIHW to HWIO; nothing is
split or merged, so an export is byte-equal to the import.
"""

import functools
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from imagen_jax.deepfloyd import config as configs
from imagen_jax.deepfloyd.unet import IFUNet
from imagen_jax.errors import UsageError
from imagen_jax.io import files, hub_folder, safetensors

STEM = 'diffusion_pytorch_model'
CONVERT = (
  'diffusers: UNet2DConditionModel.from_pretrained(…).save_pretrained(…, '
  'safe_serialization=True)'
)
LISTS = re.compile(
  r'\b(down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|to_out)'
  r'_(\d+)\b'
)


def torch_name(path: tuple[str, ...]) -> str:
  """diffusers' name of the leaf at a Flax path, a tuple of strings.

  `kernel` and the norms' `scale` are both `weight` there.
  """
  *modules, leaf = path
  name = LISTS.sub(r'\1.\2', '.'.join(modules))
  return f'{name}.{ {"kernel": "weight", "scale": "weight"}.get(leaf, leaf) }'


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in the file of a Flax leaf of shape `shape`."""
  if _as_is(name, shape):
    return shape
  return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
  """A view: OIHW -> HWIO, [out, in] -> [in, out], vectors unchanged."""
  if _as_is(name, array.shape):
    return array
  return array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
  """The inverse of `from_torch`."""
  if _as_is(name, array.shape):
    return array
  return array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))


def _as_is(name: str, shape: tuple[int, ...]) -> bool:
  # The attention pooling's position vector is (1, width) in both.
  return len(shape) == 1 or name.endswith('positional_embedding')


@functools.lru_cache
def abstract_params(config: configs.UNetConfig) -> dict:
  """The parameters of a `UNetConfig`'s network as `jax.ShapeDtypeStruct`s."""
  side = config.multiple
  return jax.eval_shape(
    IFUNet(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.float32),
    jax.ShapeDtypeStruct((1, 2, config.text_dim), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.float32),
  )['params']


def leaves(tree: dict) -> dict[tuple[str, ...], Any]:
  """{path: leaf} of nested dictionaries, in jax's order."""
  return dict(sorted(flatten_dict(tree).items()))


def load(
  folder: str | pathlib.Path,
  *,
  dtype: DTypeLike = jnp.float32,
  weights_dtype: DTypeLike | None = None,
  place: Callable[[np.ndarray], jax.sharding.Sharding | None] | None = None,
) -> tuple[IFUNet, dict]:
  """Loads a U-Net, its weights straight from the file to their devices.

  The host holds one tensor at a time, besides what `place` keeps there.

  Args:
    folder: in diffusers' layout: `config.json` and safetensors.
    dtype: of the activations.
    weights_dtype: of the parameters; None keeps each tensor's own.
    place: array -> its sharding; None puts everything on the default device.

  Returns:
    (module, params).

  Raises:
    ModelError: the config is another network's, or a tensor is missing,
      unexpected, of another shape, pickled or truncated; it is named.
  """
  folder = pathlib.Path(folder)
  module = IFUNet(configs.read(folder), dtype)
  tensors = hub_folder.open_tensors(
    folder, STEM, what=configs.WHAT, convert=CONVERT
  )
  wanted = {
    torch_name(path): (path, leaf.shape)
    for path, leaf in leaves(abstract_params(module.config)).items()
  }
  hub_folder.check_names(folder, tensors, wanted)
  params = {}
  for name, (path, shape) in wanted.items():
    stored = hub_folder.read_shaped(
      folder, name, tensors[name], stored_shape(name, shape)
    )
    array = from_torch(name, stored)
    array = np.ascontiguousarray(array, weights_dtype or array.dtype)
    leaf = jax.device_put(array, place(array) if place else None)
    # Waiting keeps the host from reading ahead of the devices.
    params[path] = jax.block_until_ready(leaf)
  return module, unflatten_dict(params)


def save(
  folder: str | pathlib.Path,
  params: dict,
  *,
  source: Mapping[str, Any],
) -> None:
  """Writes a U-Net as a folder that diffusers loads.

  Each leaf keeps its dtype, so a checkpoint loaded with its own is written
  byte-equal.

  Args:
    folder: to write; must not hold a U-Net yet.
    params: as from `load`.
    source: the config.json's JSON object.

  Raises:
    UsageError: the folder holds a U-Net already.
    ModelError: it cannot be written, or params do not fit the config.
  """
  folder = pathlib.Path(folder)
  if (folder / 'config.json').exists():
    raise UsageError(
      f'{folder} holds a U-Net already, which is not overwritten; choose '
      'another folder.'
    )
  config = configs.parse(source, folder / 'config.json')
  wanted = [torch_name(path) for path in leaves(abstract_params(config))]
  given = {torch_name(path): leaf for path, leaf in leaves(params).items()}
  hub_folder.check_names(folder, given, wanted)
  tensors = {
    name: safetensors.Tensor(
      np.dtype(leaf.dtype),
      stored_shape(name, leaf.shape),
      functools.partial(_stored, name, leaf),
    )
    for name, leaf in given.items()
  }
  safetensors.write_file(
    folder / f'{STEM}.safetensors', tensors, metadata=hub_folder.METADATA
  )
  files.write_json(folder / 'config.json', source)


def _stored(name: str, leaf: Any) -> np.ndarray:
  return to_torch(name, np.asarray(leaf))


def num_bytes(folder: str | pathlib.Path) -> int:
  """Bytes of a folder's tensors in the file; reads no tensor."""
  tensors = hub_folder.open_tensors(
    folder, STEM, what=configs.WHAT, convert=CONVERT
  )
  return sum(
    math.prod(tensor.shape) * tensor.dtype.itemsize
    for tensor in tensors.values()
  )
