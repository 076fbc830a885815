"""The frozen encoder: embeddings that do not depend on the batch."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.text import encoder as text_encoder
from imagen_jax.text import weights
from imagen_jax.text.encoder import load_text_encoder
from tests import tiny_encoders
from tests.text.weights_test import change, edit_config

# {kind: whose folder it is}.
KINDS = {'clip_penultimate': 'clip'}
KINDS |= {kind: kind for kind in ('t5', 't5gemma', 'bert', 'clip')}


def long_and_short():
  """24 prompts, of which every fourth is long."""
  words = (
    'red circle square star above below left and one two large'.split() * 2
  )
  return [' '.join(words[: 20 if i % 4 == 0 else 3]) for i in range(24)]


@pytest.fixture(scope='session')
def folders(t5, tmp_path_factory):
  """{kind of folder: a random encoder}; read only."""
  found = {'t5': t5}
  for kind in tiny_encoders.TOKENIZERS:
    found[kind] = tmp_path_factory.mktemp('encoders') / kind
    tiny_encoders.write(found[kind], kind)
  return found


@pytest.mark.parametrize('kind', KINDS)
def test_embeddings_are_zero_at_padding_and_do_not_depend_on_the_batch(
  kind, folders
):
  encoder = load_text_encoder(folders[KINDS[kind]], kind=kind)
  assert encoder.kind == kind
  special = len(encoder.tokenizer.start + encoder.tokenizer.end)
  prompts = ['a red star', '', 'two large blue circles above a square'] * 4
  emb, mask = encoder.encode(prompts, max_len=12)
  assert emb.shape == (12, 12, encoder.dim) and emb.dtype == np.float32
  assert not np.any(emb[~mask]) and np.all(np.any(emb != 0, axis=-1) == mask)
  assert list(mask[1]) == [True] * special + [False] * (12 - special)
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
    emb, _ = step(params, ids, mask)
  else:
    made = sharding.make_mesh(*mesh, devices=jax.devices()[:4])
    place = sharding.state_shardings(params, made, min_size=2)
    batch = sharding.put_whole_batch((ids, mask), made)
    with jax.set_mesh(made):
      emb, _ = step(jax.device_put(params, place), *batch)
      emb = sharding.fetch(emb)
  np.testing.assert_allclose(emb, padded, atol=1e-5)


def test_a_step_gives_each_part_of_its_captions_their_bucket(
  folder, monkeypatch
):
  encoder = load_text_encoder(folder)
  ids, mask, _ = encoder.tokenize(long_and_short(), max_len=64)

  def spy(module, params, ids, mask):  # says how many positions it was given
    return jnp.full((*ids.shape, 1), ids.shape[1])

  monkeypatch.setattr(text_encoder, 'encode_tokens', spy)
  emb, ran = text_encoder.encode_by_length(encoder.module, {}, ids, mask)
  assert emb.shape == (24, 64, 1)
  assert emb[:, 0, 0].tolist() == [32, 16, 16, 16] * 6
  assert ran.tolist() == [0.75, 0.25, 0]  # of 16, 32 and 64 positions


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


@pytest.mark.parametrize('kind', KINDS)
def test_the_kind_is_that_of_the_folder_and_another_is_refused(kind, folders):
  folder = folders[KINDS[kind]]
  assert load_text_encoder(folder).kind == KINDS[kind]
  for other in {*KINDS, 'gpt'} - {k for k in KINDS if KINDS[k] == KINDS[kind]}:
    with pytest.raises(UsageError) as error:
      load_text_encoder(folder, kind=other)
    assert error.value.key == 'config.text.kind'


def test_every_kind_has_another_digest(folders):
  digests = {
    load_text_encoder(folders[KINDS[kind]], kind=kind).digest for kind in KINDS
  }
  assert len(digests) == len(KINDS)


def test_a_caption_has_at_most_as_many_tokens_as_there_are_positions(folders):
  for kind, limit in (('clip', 77), ('bert', 512)):
    encoder = load_text_encoder(folders[kind])
    assert encoder.max_len == min(limit, 128)
    emb, mask = encoder.encode(['red ' * 600], max_len=limit)
    assert mask.all() and np.all(np.isfinite(emb))
    for length in (limit + 1, 2):  # [CLS] and [SEP] alone
      with pytest.raises(UsageError) as error:
        load_text_encoder(folders[kind], max_len=length)
      assert error.value.key == 'config.text.max_len'
      with pytest.raises(UsageError):
        encoder.encode(['red'], max_len=length)


def as_in_bert_base(tensors):
  for name in [*tensors]:
    old = name.replace('LayerNorm.weight', 'LayerNorm.gamma')
    old = old.replace('LayerNorm.bias', 'LayerNorm.beta')
    tensors[f'bert.{old}'] = tensors.pop(name)
  tensors['cls.predictions.bias'] = np.zeros(3, np.float32)
  tensors['bert.pooler.dense.weight'] = np.zeros((3, 3), np.float32)


def as_in_minilm(tensors):
  tensors['embeddings.position_ids'] = np.arange(512)[None]
  tensors['pooler.dense.bias'] = np.zeros(3, np.float32)


def without_prefix(tensors):
  for name in [*tensors]:
    tensors[name.removeprefix('text_model.')] = tensors.pop(name)


def with_images(tensors):
  tensors['vision_model.x'] = tensors['visual_projection.weight'] = np.ones(3)
  tensors['text_projection.weight'] = tensors['logit_scale'] = np.ones(3)
  tensors['text_model.embeddings.position_ids'] = np.arange(77)[None]


@pytest.mark.parametrize(
  'kind, edit',
  [
    ('bert', as_in_bert_base),
    ('bert', as_in_minilm),
    ('clip', without_prefix),
    ('clip', with_images),
  ],
)
def test_published_names_of_tensors_give_the_same_encoder(kind, edit, tmp_path):
  tiny_encoders.write(tmp_path, kind)
  digest = load_text_encoder(tmp_path).digest
  change(tmp_path, edit)
  assert load_text_encoder(tmp_path).digest == digest


@pytest.mark.parametrize(
  'kind, spoil',
  [
    ('bert', edit_config(position_embedding_type='relative_key')),
    ('bert', edit_config(is_decoder=True)),
    ('bert', edit_config(hidden_act='silu')),
    ('bert', edit_config(num_attention_heads=3)),
    ('bert', edit_config(layer_norm_eps=None)),
    ('bert', edit_config(num_hidden_layers=3)),
    ('clip', edit_config(hidden_size=0)),
    ('clip', edit_config(vocab_size=7)),
    ('clip', lambda f: (f / 'tokenizer.json').write_text('{')),
    ('clip', lambda f: (f / 'tokenizer.json').unlink()),
    ('clip', lambda f: (f / weights.SINGLE).unlink()),
  ],
)
def test_a_folder_of_another_network_is_refused(kind, spoil, tmp_path):
  tiny_encoders.write(tmp_path, kind)
  spoil(tmp_path)
  with pytest.raises(ModelError):
    load_text_encoder(tmp_path)


def test_loading_a_folder_imports_neither_transformers_nor_torch(folders):
  code = (
    'import sys; from imagen_jax.text.encoder import load_text_encoder as load;'
    '[load(f).encode(["a star"], batch_size=1) for f in sys.argv[1:]];'
    'print([m for m in ("transformers", "torch", "optax") if m in sys.modules])'
  )
  out = subprocess.run(
    [sys.executable, '-c', code, *map(str, folders.values())],
    env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout.strip() == '[]'
