"""A CLIP of a few thousand random parameters, in Hugging Face's layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from imagen_jax.evaluation import clip

VISION = {
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'image_size': 16,
  'patch_size': 8,
}
LENGTH = 12
PROJECTION = 10


def tokenizer_files(folder):
  """Writes CLIP's byte-pair files with single letters and 'ab'."""
  letters = 'abcdefghijklmnopqrstuvwxyz.,'
  pieces = [*letters, *(f'{x}</w>' for x in letters)]
  pieces += ['ab', '<|startoftext|>', '<|endoftext|>']
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  (folder / 'vocab.json').write_text(json.dumps(vocabulary))
  (folder / 'merges.txt').write_text('#version: 0.2\na b\n')
  return vocabulary


def write(folder, act='quick_gelu', **changes):
  """Writes a folder; returns its tensors."""
  folder.mkdir(parents=True, exist_ok=True)
  vocabulary = tokenizer_files(folder)
  text = {
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'vocab_size': len(vocabulary),
    'max_position_embeddings': LENGTH,
    'eos_token_id': vocabulary['<|endoftext|>'],
    'bos_token_id': vocabulary['<|startoftext|>'],
    'hidden_act': act,
  } | changes
  config = {
    'model_type': 'clip',
    'projection_dim': PROJECTION,
    'text_config': text,
    'vision_config': VISION | {'hidden_act': act},
  }
  (folder / 'config.json').write_text(json.dumps(config))
  vision, text = clip.read_config(folder / 'config.json')
  rng, tensors = np.random.default_rng(0), {}
  for module, example in (
    (vision, jnp.zeros((1, 16, 16, 3))),
    (text, jnp.zeros((1, LENGTH), jnp.int32)),
  ):
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)['params']
    for name, shape in shapes.items():
      tensors[name] = 0.3 * rng.normal(size=shape.shape).astype(np.float32)
  tensors['logit_scale'] = np.float32(2.6)
  save_file(
    {k: np.asarray(v) for k, v in tensors.items()},
    folder / 'model.safetensors',
    {'format': 'pt'},
  )
  return tensors
