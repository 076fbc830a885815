"""Text encoders in Hugging Face folders: safetensors <-> the Flax tree.

A folder holds `config.json`, the weights as `model.safetensors` or as shards
with `model.safetensors.index.json`, and a tokenizer. Tensors are read one at a
time; given their shardings, each goes straight into its stack on the devices,
and the host holds at most one. Pickles are never read.
"""

import functools
import hashlib
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from imagen_jax.io import hub_folder, safetensors
from imagen_jax.io.files import AnyPath, write_bytes, write_json
from imagen_jax.io.safetensors import Tensor
from imagen_jax.nets.t5 import T5Encoder
from imagen_jax.text.kinds import KINDS, T5_KEYS, WHAT, TextTower

SINGLE = 'model.safetensors'
SMALL = 2**14  # numbers of a tensor that is read to tell encoders apart

# The sharding of a leaf, an array or a `jax.ShapeDtypeStruct`.
Place: TypeAlias = Callable[[Any], jax.sharding.Sharding]

# {Flax name: Hugging Face name} of T5's parameters in each layer; those of the
# other towers have their tensors' names and layouts.
LAYER = {
  'attention_norm': 'layer.0.layer_norm.weight',
  'query': 'layer.0.SelfAttention.q.weight',
  'key': 'layer.0.SelfAttention.k.weight',
  'value': 'layer.0.SelfAttention.v.weight',
  'out': 'layer.0.SelfAttention.o.weight',
  'mlp_norm': 'layer.1.layer_norm.weight',
  'gate': 'layer.1.DenseReluDense.wi_0.weight',
  'in': 'layer.1.DenseReluDense.wi_1.weight',
  'mlp_out': 'layer.1.DenseReluDense.wo.weight',
}
TOP = {
  'embedding': 'shared.weight',
  'distance_bias': (
    'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  ),
  'norm': 'encoder.final_layer_norm.weight',
}
CONVERT = 'transformers: T5EncoderModel.from_pretrained(…).save_pretrained(…)'


def load_params(
  folder: AnyPath,
  module: TextTower,
  *,
  place: Place | None = None,
) -> tuple[dict[str, Any], str]:
  """Reads a folder's weights for `module`, tensor by tensor.

  Matrices are in `module.dtype`; norms, biases and T5's distance bias in
  float32.

  Args:
    folder: in Hugging Face layout.
    module: from `kinds.module_from_config`.
    place: gives the sharding of a leaf; None puts everything on the default
      device, where a small encoder loads fastest.

  Returns:
    (params, digest): the tree for `module.apply({'params': params}, …)`, and
    the sha256 of the encoder's tensors, independent of the files' shards.

  Raises:
    ModelError: weights are missing, pickled, truncated, or do not fit the
      config; the message names the file and the tensor.
  """
  folder = pathlib.Path(folder)
  tensors = _open(folder, module)
  digests: dict[str, str] = {}

  def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in Flax's layout, of the given shape."""
    stored = _torch_shape(shape, name)
    array = hub_folder.read_shaped(folder, name, tensors[name], stored)
    digests[name] = _sha256(array)
    return array.T.reshape(shape) if _transposed(name) else array

  def layers(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    count, *shape = leaf.shape
    parts = (
      read(_torch_name(name, i, module), tuple(shape)).astype(leaf.dtype)
      for i in range(count)
    )
    if place:
      return _stack_on_device(leaf, parts, place(leaf))
    stack = np.empty(leaf.shape, leaf.dtype)
    for i, part in enumerate(parts):
      stack[i] = part
    return jnp.asarray(stack)

  def whole(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    array = read(TOP.get(name, name), leaf.shape).astype(leaf.dtype)
    return jax.device_put(array, place(array)) if place else jnp.asarray(array)

  tree = abstract_params(module)
  stacks = tree.pop('layers')
  params: dict[str, Any] = {n: whole(n, leaf) for n, leaf in tree.items()}
  params['layers'] = {n: layers(n, leaf) for n, leaf in stacks.items()}
  listed = ''.join(f'{name} {digests[name]}\n' for name in sorted(digests))
  return params, hashlib.sha256(listed.encode()).hexdigest()


def digest_small(folder: AnyPath, module: TextTower) -> str:
  """sha256 of the tensors of less than `SMALL` numbers, such as norms.

  Raises:
    ModelError: as `load_params`.
  """
  tensors = _open(pathlib.Path(folder), module)
  listed = ''.join(
    f'{name} {_sha256(tensor.read())}\n'
    for name, tensor in sorted(tensors.items())
    if math.prod(tensor.shape) < SMALL
  )
  return hashlib.sha256(listed.encode()).hexdigest()


def abstract_params(module: TextTower) -> dict[str, Any]:
  """Shapes and types of the parameters that `load_params` reads."""

  def as_loaded(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    vector = leaf.ndim - (path[0].key == 'layers') == 1
    precise = vector or path[-1].key == 'distance_bias'
    dtype = jnp.float32 if precise else module.dtype
    return jax.ShapeDtypeStruct(leaf.shape, dtype)

  return jax.tree_util.tree_map_with_path(as_loaded, _traced_params(module))


@functools.cache  # loading asks twice, and a trace takes 0.1 s
def _traced_params(module: TextTower) -> Any:
  """Shapes and types of the network's own parameters."""
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 2), bool)
  tree: Any = jax.eval_shape(module.init, jax.random.key(0), ids, mask)
  return tree['params']


def _open(folder: pathlib.Path, module: TextTower) -> dict[str, Tensor]:
  """{name in the network: tensor} of a folder."""
  kind = next(k for k in KINDS.values() if k.module is type(module))
  given = hub_folder.open_tensors(
    folder, 'model', what=WHAT, convert=CONVERT, used=kind.tensor
  )
  top = abstract_params(module)
  layer = top.pop('layers')
  wanted = [TOP.get(name, name) for name in top]
  for name, leaf in layer.items():
    wanted += [_torch_name(name, i, module) for i in range(leaf.shape[0])]
  named = {name: str(kind.tensor(name)) for name in given}
  hub_folder.check_names(folder, [*named.values()], wanted)
  # Of two names of a tensor, its own.
  return {named[name]: given.get(named[name], given[name]) for name in given}


def _stack_on_device(
  leaf: jax.ShapeDtypeStruct,
  parts: Iterator[np.ndarray],
  sharding: jax.sharding.Sharding,
) -> jax.Array:
  """Fills a sharded stack layer by layer, in place."""
  stack = _zeros(leaf.shape, leaf.dtype, sharding)()
  for i, part in enumerate(parts):
    # Waiting keeps the host from reading ahead of the devices.
    stack = jax.block_until_ready(_put_layer(stack, part, i))
  return stack


@functools.cache  # compiled once, however often an encoder is loaded
def _zeros(
  shape: tuple[int, ...], dtype: DTypeLike, sharding: jax.sharding.Sharding
) -> Callable[[], jax.Array]:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack: jax.Array, part: np.ndarray, i: int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, part, i, 0)


def save_folder(
  folder: AnyPath,
  module: T5Encoder,
  params: Mapping[str, Any],
  *,
  files: Mapping[str, bytes],
  dtype: DTypeLike | None = None,
  **config: Any,
) -> None:
  """Writes a T5 as a Hugging Face folder that transformers can load.

  Args:
    folder: created if missing.
    module: the `T5Encoder`.
    params: its parameters.
    files: {name: bytes} of further files, such as the tokenizer's.
    dtype: type of the saved tensors; None keeps each tensor's.
    **config: further keys for `config.json`.
  """
  folder = pathlib.Path(folder)
  leaves = {TOP[name]: params[name] for name in params.keys() & TOP.keys()}
  for name, stack in params['layers'].items():
    for i in range(module.num_layers):
      leaves[_torch_name(name, i, module)] = stack[i]
  safetensors.write_file(
    folder / SINGLE,
    {name: _exported(name, leaf, dtype) for name, leaf in leaves.items()},
    metadata=hub_folder.METADATA,
  )
  write_json(folder / 'config.json', _config(module) | config)
  for name, data in files.items():
    write_bytes(folder / name, data)


def _exported(name: str, leaf: jax.Array, dtype: DTypeLike | None) -> Tensor:
  """A parameter in torch's layout, converted when it is written."""
  kind = np.dtype(leaf.dtype if dtype is None else dtype)

  def read() -> np.ndarray:
    array = np.asarray(leaf).astype(kind)
    if _transposed(name):
      array = array.reshape(_torch_shape(array.shape, name)[::-1]).T
    return array

  return Tensor(kind, _torch_shape(leaf.shape, name), read)


def _config(module: T5Encoder) -> dict[str, Any]:
  """A module's hyper-parameters as transformers' `config.json`."""
  return {
    'architectures': ['T5EncoderModel'],
    'model_type': 't5',
    **{key: getattr(module, name) for name, key in T5_KEYS.items()},
    'feed_forward_proj': 'gated-gelu' if module.gated else 'relu',
    'pad_token_id': 0,
    'eos_token_id': 1,
    'tie_word_embeddings': False,
  }


def _torch_name(name: str, i: int, module: TextTower) -> str:
  """The tensor of layer i that belongs to a stack of parameters."""
  if not isinstance(module, T5Encoder):
    return f'{module.PREFIX}.{i}.{name}'
  if name == 'in' and not module.gated:
    return f'encoder.block.{i}.layer.1.DenseReluDense.wi.weight'
  return f'encoder.block.{i}.{LAYER[name]}'


def _transposed(name: str) -> bool:
  """Whether a tensor is a Linear's, which torch stores as [out, in]."""
  return re.search(r'\.(q|k|v|o|wi|wi_0|wi_1|wo)\.weight$', name) is not None


def _torch_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
  if not _transposed(name):
    return tuple(shape)
  # [D, N, H] -> [N·H, D], but the output projection [N, H, D] -> [D, N·H].
  split = len(shape) - 1 if name.endswith('.o.weight') else 1
  return math.prod(shape[split:]), math.prod(shape[:split])


def _sha256(array: np.ndarray) -> str:
  digest = hashlib.sha256(f'{array.dtype} {array.shape} '.encode())
  digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()
