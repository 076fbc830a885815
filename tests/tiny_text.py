"""Small random text encoders for tests, made without torch."""

import functools
import io
import random

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from imagen_jax.nets.t5 import T5Encoder
from imagen_jax.text.weights import save_folder

WORDS = (
  'a an the red green blue circle square star above below left of and on '
  'one two three small large image'
).split()


@functools.cache
def vocabulary(seed=0):
  """Bytes of a spiece.model of about 60 pieces, with T5's special ids."""
  out = io.BytesIO()
  rng = np.random.default_rng(seed)
  lines = [' '.join(rng.choice(WORDS, 6)) for _ in range(500)]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=out,
    vocab_size=60,
    hard_vocab_limit=False,
    required_chars='abcdefghijklmnopqrstuvwxyz.,',
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  return out.getvalue()


def random_params(module, seed=0):
  """Random parameters of a `T5Encoder`."""
  ids = jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids == 0)
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    normal = rng.normal(size=shape.shape).astype(np.float32)
    name = path[-1].key
    if name.endswith('norm'):
      return jnp.asarray(1 + 0.03 * normal)
    if name in ('embedding', 'distance_bias'):
      return jnp.asarray((1 if name == 'embedding' else 0.2) * normal)
    # [layers, inputs, …] and, of attention's output, [layers, heads, size, D].
    inputs = shape.shape[1:3] if name == 'out' else shape.shape[1:2]
    return jnp.asarray(normal / np.sqrt(np.prod(inputs)))

  return jax.tree_util.tree_map_with_path(leaf, shapes['params'])


def random_folder(folder, seed=0, **sizes):
  """Writes a random T5 as a Hugging Face folder; returns (module, params)."""
  sizes = {
    'vocab_size': 80,
    'width': 16,
    'num_layers': 2,
    'num_heads': 2,
    'head_dim': 8,
    'mlp_dim': 24,
    **sizes,
  }
  module = T5Encoder(**sizes)
  params = random_params(module, seed)
  save_folder(folder, module, params, files={'spiece.model': vocabulary()})
  return module, params


def varied(number, seed=0):
  """Strings of every kind that users might enter."""
  rng = random.Random(seed)
  words = [*WORDS] + (
    "photograph oil painting Astronaut Über naïve 東京 поезд 🙂 don't "
    'e-mail 3.14 $5 A.I. ½ ﬁne zero\u00a0width\u200bspace'
  ).split(' ')
  ends = ['', '.', '!', ' ', '\n', '\t…', ' \u3000']
  out = ['', ' ', '\n', 'a' * 300]
  for _ in range(number - len(out)):
    kind = rng.random()
    if kind < 0.7:
      text = rng.choice((' ', ' ', ', ', '  ')).join(
        rng.choices(words, k=rng.randint(1, 20))
      )
      text = rng.choice((str, str.upper, str.title))(text) + rng.choice(ends)
    elif kind < 0.85:
      text = ''.join(
        map(chr, rng.choices(range(32, 127), k=rng.randint(1, 60)))
      )
    else:
      code = (rng.randint(1, 0xD7FF) for _ in range(rng.randint(1, 30)))
      text = ''.join(map(chr, code))
    out.append(text)
  return out
