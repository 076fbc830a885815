"""T5 encoders in Hugging Face folders: safetensors <-> the Flax tree.

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

from imagen_jax.errors import ModelError
from imagen_jax.io import hub_folder, safetensors
from imagen_jax.io.files import AnyPath, read_json, write_bytes, write_json
from imagen_jax.io.safetensors import Tensor
from imagen_jax.nets.t5 import T5Encoder

SINGLE = 'model.safetensors'

# The sharding of a leaf, an array or a `jax.ShapeDtypeStruct`.
Place: TypeAlias = Callable[[Any], jax.sharding.Sharding]
Shapes: TypeAlias = dict[str, tuple[int, ...]]

# {Flax name: Hugging Face name} of the parameters of each layer.
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
# {attribute of `T5Encoder`: key of config.json}.
SIZES = {
  'vocab_size': 'vocab_size',
  'width': 'd_model',
  'num_layers': 'num_layers',
  'num_heads': 'num_heads',
  'head_dim': 'd_kv',
  'mlp_dim': 'd_ff',
  'num_buckets': 'relative_attention_num_buckets',
  'max_distance': 'relative_attention_max_distance',
}
# Of the keys that T5 v1.0 leaves out.
DEFAULTS = {'num_buckets': 32, 'max_distance': 128}
# Another name of shared.weight.
ALIAS = 'encoder.embed_tokens.weight'
# A full T5 also has a decoder, which Imagen does not use.
IGNORED = ('decoder.', 'lm_head.')
# These stay float32 whatever the dtype of the products.
PRECISE = ('attention_norm', 'mlp_norm', 'norm', 'distance_bias')

WHAT = (
  'a text encoder is a folder in Hugging Face layout: config.json, '
  'model.safetensors, spiece.model'
)
CONVERT = 'transformers: T5EncoderModel.from_pretrained(…).save_pretrained(…)'


def read_config(folder: AnyPath) -> dict[str, Any]:
  """Reads a folder's `config.json`.

  Raises:
    ModelError: the file is missing or not JSON.
  """
  path = pathlib.Path(folder) / 'config.json'
  return read_json(path, advice=hub_folder.AGAIN, missing=WHAT)


def model_max_length(folder: AnyPath) -> float:
  """`model_max_length` of a folder's `tokenizer_config.json`, or infinity."""
  path = pathlib.Path(folder) / 'tokenizer_config.json'
  if not path.exists():
    return math.inf
  length = read_json(path).get('model_max_length') or math.inf
  if not isinstance(length, int | float) or not length >= 2:
    raise ModelError(
      f'{path} has model_max_length = {length!r}; a tokenizer has a number '
      f'there, or none; {hub_folder.AGAIN}.'
    )
  return length


def module_from_config(
  folder: AnyPath,
  config: Mapping[str, Any],
  *,
  dtype: DTypeLike = jnp.float32,
) -> T5Encoder:
  """The `T5Encoder` that a Hugging Face `config.json` describes.

  Args:
    folder: where the config is from, for error messages.
    config: `read_config(folder)`.
    dtype: the module's.

  Raises:
    ModelError: it does not describe a supported T5.
  """
  path = pathlib.Path(folder) / 'config.json'
  kind = config.get('model_type', 't5')
  if kind not in ('t5', 'mt5'):
    raise ModelError(
      f'{path} has model_type {kind!r}, which is not a T5; give the folder of '
      'a T5 such as google/t5-v1_1-xxl or flan-t5.'
    )
  gated = {'relu': False, 'gated-gelu': True}
  activation = config.get('feed_forward_proj', 'relu')
  if not isinstance(activation, str) or activation not in gated:
    raise ModelError(
      f'{path} has feed_forward_proj {activation!r}; only relu (T5 v1.0) and '
      'gated-gelu (v1.1, Flan) are supported.'
    )

  sizes: dict[str, Any] = {
    name: config.get(key, DEFAULTS.get(name)) for name, key in SIZES.items()
  }
  for name, value in sizes.items():
    if not isinstance(value, int) or not 0 < value < 2**31:
      raise ModelError(
        f'{path} has {SIZES[name]} = {value!r}; a T5 has a whole number above '
        '0 there.'
      )
  epsilon = config.get('layer_norm_epsilon', 1e-6)
  if not isinstance(epsilon, float) or not 0 < epsilon < 1:
    raise ModelError(
      f'{path} has layer_norm_epsilon = {epsilon!r}; it is a small number '
      'above 0.'
    )
  return T5Encoder(
    **sizes,
    gated=gated[activation],
    epsilon=epsilon,
    dtype=dtype,
  )


def load_params(
  folder: AnyPath,
  module: T5Encoder,
  *,
  place: Place | None = None,
) -> tuple[dict[str, Any], str]:
  """Reads a folder's weights for `module`, tensor by tensor.

  Matrices are in `module.dtype`, norms and the distance bias in float32.

  Args:
    folder: in Hugging Face layout.
    module: the `T5Encoder`.
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

  def dtype(name: str) -> DTypeLike:
    return np.float32 if name in PRECISE else np.dtype(module.dtype)

  def layers(name: str, shape: tuple[int, ...]) -> jax.Array:
    leaf = jax.ShapeDtypeStruct((module.num_layers, *shape), dtype(name))
    parts = (
      read(_torch_name(name, i, module), shape).astype(leaf.dtype)
      for i in range(module.num_layers)
    )
    if place:
      return _stack_on_device(leaf, parts, place(leaf))
    stack = np.empty(leaf.shape, leaf.dtype)
    for i, part in enumerate(parts):
      stack[i] = part
    return jnp.asarray(stack)

  def whole(name: str, shape: tuple[int, ...]) -> jax.Array:
    array = read(TOP[name], shape).astype(dtype(name))
    return jax.device_put(array, place(array)) if place else jnp.asarray(array)

  layer, top = _names(module)
  params: dict[str, Any] = {n: whole(n, shape) for n, shape in top.items()}
  params['layers'] = {n: layers(n, shape) for n, shape in layer.items()}
  listed = ''.join(f'{name} {digests[name]}\n' for name in sorted(digests))
  return params, hashlib.sha256(listed.encode()).hexdigest()


def _open(folder: pathlib.Path, module: T5Encoder) -> dict[str, Tensor]:
  """Opens a folder with the module's tensors, and perhaps a decoder's."""
  tensors = hub_folder.open_tensors(folder, 'model', what=WHAT, convert=CONVERT)
  if ALIAS in tensors:
    alias = tensors.pop(ALIAS)
    tensors.setdefault(TOP['embedding'], alias)
  layer, top = _names(module)
  wanted = [TOP[name] for name in top]
  for i in range(module.num_layers):
    wanted += [_torch_name(name, i, module) for name in layer]
  given = [name for name in tensors if not name.startswith(IGNORED)]
  hub_folder.check_names(folder, given, wanted)
  return tensors


def _stack_on_device(
  leaf: jax.ShapeDtypeStruct,
  parts: Iterator[np.ndarray],
  sharding: jax.sharding.Sharding,
) -> jax.Array:
  """Fills a sharded stack layer by layer, in place."""
  zeros = lambda: jnp.zeros(leaf.shape, leaf.dtype)
  stack = jax.jit(zeros, out_shardings=sharding)()
  for i, part in enumerate(parts):
    # Waiting keeps the host from reading ahead of the devices.
    stack = jax.block_until_ready(_put_layer(stack, part, i))
  return stack


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
  """Writes an encoder as a Hugging Face folder that transformers can load.

  Args:
    folder: created if missing.
    module: the `T5Encoder`.
    params: its parameters.
    files: {name: bytes} of further files, such as the tokenizer's.
    dtype: type of the saved tensors; None keeps each tensor's.
    **config: further keys for `config.json`.
  """
  folder = pathlib.Path(folder)
  layer, top = _names(module)
  leaves = {TOP[name]: params[name] for name in top}
  for i in range(module.num_layers):
    for name in layer:
      leaves[_torch_name(name, i, module)] = params['layers'][name][i]
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
    **{key: getattr(module, name) for name, key in SIZES.items()},
    'feed_forward_proj': 'gated-gelu' if module.gated else 'relu',
    'layer_norm_epsilon': module.epsilon,
    'pad_token_id': 0,
    'eos_token_id': 1,
    'tie_word_embeddings': False,
  }


def _names(module: T5Encoder) -> tuple[Shapes, Shapes]:
  """({Flax name: shape} of one layer, {Flax name: shape} of the rest)."""
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 2), bool)
  tree = jax.eval_shape(module.init, jax.random.key(0), ids, mask)['params']
  layer = {k: v.shape[1:] for k, v in tree.pop('layers').items()}
  return layer, {k: v.shape for k, v in tree.items()}


def _torch_name(name: str, i: int, module: T5Encoder) -> str:
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
