"""The frozen encoder: embeddings that do not depend on the batch."""

import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.errors import UsageError
from imagen_jax.text.encoder import load_text_encoder


def test_embeddings_are_zero_at_padding_and_do_not_depend_on_the_batch(folder):
  encoder = load_text_encoder(folder)
  prompts = ['a red star', '', 'two large blue circles above a square'] * 4
  emb, mask = encoder.encode(prompts, max_len=12)
  assert emb.shape == (12, 12, encoder.dim) and emb.dtype == np.float32
  assert not np.any(emb[~mask]) and np.all(np.any(emb != 0, axis=-1) == mask)
  assert list(mask[1]) == [True] + [False] * 11  # </s> alone
  for i, prompt in enumerate(prompts):
    alone, _ = encoder.encode([prompt], max_len=12)
    np.testing.assert_array_equal(emb[i], alone[0])


def test_max_len_comes_from_the_argument_the_folder_or_128(folder):
  assert load_text_encoder(folder).max_len == 128
  tokens = folder / 'tokenizer_config.json'
  tokens.write_text('{"model_max_length": 40}')
  assert load_text_encoder(folder).max_len == 40
  assert load_text_encoder(folder, max_len=77).max_len == 77
  tokens.write_text('{"model_max_length": 1000000000000000019884624838656}')
  assert load_text_encoder(folder).max_len == 128
  for arguments in ({'dtype': 'float8'}, {'max_len': 1}):
    with pytest.raises(UsageError):
      load_text_encoder(folder, **arguments)


def test_loading_a_folder_imports_neither_transformers_nor_torch(folder):
  code = (
    'import sys; from imagen_jax.text.encoder import load_text_encoder;'
    f'load_text_encoder({str(folder)!r}).encode(["a star"]);'
    'print([m for m in ("transformers", "torch", "optax") if m in sys.modules])'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == '[]'
