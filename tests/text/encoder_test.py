"""The frozen encoder: embeddings that do not depend on the batch."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.errors import UsageError
from imagen_jax.text import encoder as text_encoder
from imagen_jax.text.encoder import load_text_encoder


def long_and_short():
  """24 prompts, of which every fourth is long."""
  words = (
    'red circle square star above below left and one two large'.split() * 2
  )
  return [' '.join(words[: 20 if i % 4 == 0 else 3]) for i in range(24)]


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


def test_buckets_double_up_to_the_longest():
  assert text_encoder.buckets(128) == [16, 32, 64, 128]
  assert text_encoder.buckets(77) == [16, 32, 64, 77]
  assert [*map(text_encoder.buckets, (1, 16, 17))] == [[1], [16], [16, 17]]


def test_captions_are_encoded_at_the_length_of_their_bucket(
  folder, monkeypatch
):
  encoder = load_text_encoder(folder)
  prompts, shapes = long_and_short(), []
  ids, mask, _ = encoder.tokenize(prompts, max_len=64)
  at_full_length = text_encoder.encode_tokens
  padded = at_full_length(encoder.module, encoder.params, ids, mask)

  def seen(module, params, ids, mask):
    shapes.append(ids.shape)
    return at_full_length(module, params, ids, mask)

  monkeypatch.setattr(text_encoder, 'encode_tokens', seen)
  emb, kept = encoder.encode(prompts, max_len=64, batch_size=6)
  assert shapes == [(6, 16)] * 3 + [(6, 32)]
  np.testing.assert_array_equal(kept, mask)
  np.testing.assert_allclose(emb, padded, atol=1e-5)


@pytest.mark.parametrize('mesh', [None, (4, 1), (2, 2)])
def test_a_step_embeds_by_length_what_it_would_embed_padded(folder, mesh):
  encoder = load_text_encoder(folder)
  ids, mask, _ = encoder.tokenize(long_and_short(), max_len=64)
  padded = text_encoder.encode_tokens(encoder.module, encoder.params, ids, mask)
  params, by_length = encoder.params, text_encoder.encode_by_length
  step = jax.jit(lambda *args: by_length(encoder.module, *args))
  if mesh is None:
    emb = step(params, ids, mask)
  else:
    made = sharding.make_mesh(*mesh, devices=jax.devices()[:4])
    place = sharding.state_shardings(params, made, min_size=2)
    batch = sharding.put_whole_batch((ids, mask), made)
    with jax.set_mesh(made):
      emb = sharding.fetch(step(jax.device_put(params, place), *batch))
  np.testing.assert_allclose(emb, padded, atol=1e-5)


def test_a_step_gives_each_part_of_its_captions_their_bucket(
  folder, monkeypatch
):
  encoder = load_text_encoder(folder)
  ids, mask, _ = encoder.tokenize(long_and_short(), max_len=64)

  def spy(module, params, ids, mask):  # says how many positions it was given
    return jnp.full((*ids.shape, 1), ids.shape[1])

  monkeypatch.setattr(text_encoder, 'encode_tokens', spy)
  emb = text_encoder.encode_by_length(encoder.module, {}, ids, mask)
  assert emb.shape == (24, 64, 1)
  assert emb[:, 0, 0].tolist() == [32, 16, 16, 16] * 6


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
