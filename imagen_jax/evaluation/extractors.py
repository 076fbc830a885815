"""The networks through which images are compared, with a user's weights.

Inception's lie in one file, CLIP's in a Hugging Face folder. Weights are read
from safetensors or npz, never unpickled, and every tensor must have the name
and shape that the network expects. The file's digest goes into each score.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from imagen_jax.errors import ModelError
from imagen_jax.evaluation import clip, inception
from imagen_jax.io import files, safetensors

BATCH = 16


@dataclasses.dataclass(frozen=True)
class Extractor:
  """A network with its weights.

  Attributes:
    image: uint8 [N, H, W, 3] -> float32 [N, D].
    digest: sha256 of the weights' file, 64 hex digits.
    resize: the rule by which images come to the network's size.
    text: list of N sentences -> float32 [N, D], or None.
  """

  image: Callable
  digest: str
  resize: str
  text: Callable | None = None


def read_tensors(path):
  """({name: float32 array}, sha256) of a safetensors or npz file.

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
      with np.load(path, allow_pickle=False) as file:
        tensors = {name: file[name] for name in file.files}
    else:
      opened = safetensors.open_file(path)
      tensors = {name: tensor.read() for name, tensor in opened.items()}
  except (OSError, ValueError, TypeError) as error:
    raise ModelError(
      f'{path} cannot be read ({error}); copy it again from where it came.'
    ) from error
  return tensors, digest


def params_for(module, example, tensors, path, *, ignored=()):
  """The parameters of a module with flat, dotted names, checked.

  Args:
    module: Flax module.
    example: an array it can be called with, or its shape and type.
    tensors: from `read_tensors`.
    path: where they came from, for the message.
    ignored: beginnings and endings of names that the module does not need.

  Raises:
    ModelError: naming the first tensor that is missing, unknown, or of
      another shape.
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
        'know; it holds the weights of another network.'
      )
  return {name: jnp.asarray(tensors[name], jnp.float32) for name in shapes}


def load_inception(path):
  """The FID's InceptionV3 from a file with the usual converted names.

  Raises:
    ModelError: see `read_tensors` and `params_for`.
  """
  tensors, digest = read_tensors(path)
  module = inception.InceptionV3()
  example = jax.ShapeDtypeStruct(
    (1, inception.SIZE, inception.SIZE, 3), jnp.float32
  )
  # fc belongs to the classifier; num_batches_tracked counts training steps.
  ignored = ('fc.', 'AuxLogits.', '.num_batches_tracked')
  params = params_for(module, example, tensors, path, ignored=ignored)
  apply = jax.jit(lambda params, x: module.apply({'params': params}, x))

  def image(images):
    def one(batch):
      batch = _resized(batch, inception.SIZE)
      return apply(params, batch.astype(np.float32) / 127.5 - 1)

    return _batched(one, images)

  return Extractor(image, digest, _rule(inception.SIZE))


def load_clip(folder):
  """CLIP from a Hugging Face folder: config, weights, tokenizer.

  Raises:
    ModelError: a file of it is missing, broken or another model's.
  """
  from imagen_jax.text import clip_tokenizer

  folder = pathlib.Path(folder)
  (see, read), projection = _clip_sizes(folder / 'config.json')
  path = next(
    (
      p
      for p in map(folder.joinpath, ('model.safetensors', 'model.npz'))
      if p.exists()
    ),
    folder / 'model.safetensors',
  )
  tensors, digest = read_tensors(path)
  looks = clip.ClipImage(see, projection)
  reads = clip.ClipText(read, projection)
  size, length = see['size'], read['length']
  example = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  words = jax.ShapeDtypeStruct((1, length), jnp.int32)
  others = ('logit_scale', 'position_ids')
  seen = params_for(looks, example, tensors, path, ignored=(*others, 'text_'))
  said = params_for(
    reads, words, tensors, path, ignored=(*others, 'vision_', 'visual_')
  )
  look = jax.jit(lambda params, x: looks.apply({'params': params}, x))
  understand = jax.jit(lambda params, x: reads.apply({'params': params}, x))
  tokenize = clip_tokenizer.load(folder, length)

  def image(images):
    def one(batch):
      batch = _resized(batch, size).astype(np.float32) / 255
      batch = (batch - np.float32(clip.MEAN)) / np.float32(clip.STD)
      return look(seen, batch)

    return _batched(one, images)

  def text(prompts):
    return _batched(lambda ids: understand(said, ids), tokenize(prompts))

  return Extractor(image, digest, _rule(size), text)


def _clip_sizes(path):
  """((image sizes, text sizes), projection) of a config.json."""
  try:
    config = files.read_json(path, advice='copy the whole folder again')
    both = []
    for part, more in (
      ('vision_config', {'size': 'image_size', 'patch': 'patch_size'}),
      (
        'text_config',
        {
          'vocab': 'vocab_size',
          'length': 'max_position_embeddings',
          'eos': 'eos_token_id',
        },
      ),
    ):
      found = DEFAULTS[part] | config[part]
      names = {
        'width': 'hidden_size',
        'mlp': 'intermediate_size',
        'layers': 'num_hidden_layers',
        'heads': 'num_attention_heads',
        'act': 'hidden_act',
        'eps': 'layer_norm_eps',
        **more,
      }
      both.append({key: found[name] for key, name in names.items()})
    acts = {sizes['act'] for sizes in both}
    if not acts <= {'quick_gelu', 'gelu'}:
      raise ValueError(f'hidden_act {acts}')
    return both, config.get('projection_dim', 512)
  except (ValueError, KeyError, TypeError) as error:
    raise ModelError(
      f'{path} is no config of a CLIP model ({error!r}); copy the whole '
      'folder of the model.'
    ) from error


# What a published config leaves out, as Hugging Face fills it in (ViT-B/32).
_SHARED = {'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5}
DEFAULTS = {
  'vision_config': _SHARED
  | {
    'hidden_size': 768,
    'intermediate_size': 3072,
    'num_hidden_layers': 12,
    'num_attention_heads': 12,
    'image_size': 224,
    'patch_size': 32,
  },
  'text_config': _SHARED
  | {
    'hidden_size': 512,
    'intermediate_size': 2048,
    'num_hidden_layers': 12,
    'num_attention_heads': 8,
    'vocab_size': 49408,
    'max_position_embeddings': 77,
    'eos_token_id': 49407,
  },
}


def _rule(size):
  return f'Pillow bicubic, antialiased, to {size}'


def _resized(images, size):
  """uint8 [N, H, W, 3] at another size, rounded to uint8 again."""
  if images.shape[1:3] == (size, size):
    return images
  return np.stack(
    [
      np.asarray(
        Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)
      )
      for x in images
    ]
  )


def _batched(function, rows):
  """`function` of all rows, `BATCH` at a time, the last batch filled up."""
  found = []
  for start in range(0, len(rows), BATCH):
    batch = np.asarray(rows[start : start + BATCH])
    fill = np.repeat(batch[-1:], BATCH - len(batch), axis=0)
    out = function(np.concatenate([batch, fill]))
    found.append(np.asarray(out, np.float32)[: len(batch)])
  return np.concatenate(found)
