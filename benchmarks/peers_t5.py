"""Captions through the encoder of T5 v1.1 base, with random weights."""

import numpy as np

CAPTIONS, TOKENS, LENGTH = 8, 20, 64


def _tokens():
  ids = np.random.default_rng(0).integers(3, 32000, (CAPTIONS, LENGTH))
  mask = np.broadcast_to(np.arange(LENGTH) < TOKENS, ids.shape)
  return np.where(mask, ids, 0).astype(np.int32), np.array(mask)


def _ours(layers):
  import jax

  from imagen_jax.nets.t5 import SIZES, T5Encoder
  from imagen_jax.text.encoder import TextEncoder

  module = T5Encoder(**SIZES['base'] | {'num_layers': layers})
  ids, mask = _tokens()
  params = jax.jit(module.init)(jax.random.key(0), ids, mask)['params']
  encoder = TextEncoder(module, params, None, 768, LENGTH, '')
  return lambda: [*encoder.encode_tokens(ids, mask, lambda size: CAPTIONS)]


def _transformers(layers):
  import torch
  import transformers

  config = transformers.T5Config(
    d_model=768, d_ff=2048, num_layers=layers, num_heads=12,
    feed_forward_proj='gated-gelu', vocab_size=32128,
  )  # fmt: skip
  model = transformers.T5EncoderModel(config).eval()
  ids, mask = (torch.from_numpy(x) for x in _tokens())
  ids, mask = ids.long(), mask.long()

  def work():
    with torch.no_grad():
      model(input_ids=ids, attention_mask=mask)

  return work


contenders = {'imagen_jax': _ours, 'transformers': _transformers}
