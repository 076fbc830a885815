"""BERT, CLIP, T5Gemma as text encoders, against transformers' torch modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.text import weights
from imagen_jax.text.encoder import encode_tokens, load_text_encoder
from tests import tiny_encoders
from tests.nets.t5_test import padded_batch

BERTS = {
  'small': {},
  'one layer, one head': {'num_hidden_layers': 1, 'num_attention_heads': 1},
  'wide': {
    'hidden_size': 96,
    'intermediate_size': 200,
    'num_attention_heads': 6,
    'num_hidden_layers': 4,
  },
  'tanh, one kind of sentence': {
    'hidden_act': 'gelu_new',
    'type_vocab_size': 1,
    'layer_norm_eps': 1e-5,
  },
}
CLIPS = {
  'small': {},
  'one layer, one head': BERTS['one layer, one head'],
  'wide': BERTS['wide'],
  'as in later models': {'hidden_act': 'gelu', 'layer_norm_eps': 1e-3},
}
GEMMAS = {
  'small': {},
  'one layer, one head': BERTS['one layer, one head'],
  'groups of heads': {
    'hidden_size': 32,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 12,
    'query_pre_attn_scalar': 3,
  },
  'other numbers': {
    'num_hidden_layers': 3,
    'attn_logit_softcapping': 1.5,
    'rms_norm_eps': 1e-3,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 100.0},
  },
}
CHANGES = {'bert': BERTS, 'clip': CLIPS, 't5gemma': GEMMAS}
CASES = [(kind, name) for kind, cases in CHANGES.items() for name in cases]


def loaded(folder, kind):
  tiny_encoders.write(folder, kind.removesuffix('_penultimate'))
  return load_text_encoder(folder, kind=kind)


def randomize(model, seed):
  """Makes norms and biases of a torch module random too."""
  import torch

  torch.manual_seed(seed)
  with torch.no_grad():
    for p in model.parameters():
      p += 0.1 * torch.randn_like(p)
  return model.eval()


def saved_by_transformers(folder, kind, changes):
  """A random torch module, saved as transformers saves it."""
  import transformers

  made, sizes = {
    'bert': (transformers.BertModel, transformers.BertConfig),
    'clip': (transformers.CLIPTextModel, transformers.CLIPTextConfig),
    't5gemma': (
      transformers.T5GemmaEncoderModel,
      functools.partial(transformers.T5GemmaConfig, is_encoder_decoder=False),
    ),
  }[kind]
  # Nothing of a caption is special to a tower.
  written = tiny_encoders.config(kind, **changes)
  tiny_encoders.write(folder, kind, **changes)
  model = randomize(made(sizes(**written)), len(changes))
  (folder / weights.SINGLE).unlink()
  model.save_pretrained(folder)
  return model


@pytest.mark.parity
@pytest.mark.parametrize('kind, name', CASES)
def test_torch_and_flax_agree_to_1e_5_with_padding(kind, name, tmp_path):
  torch = pytest.importorskip('torch')
  model = saved_by_transformers(tmp_path, kind, CHANGES[kind][name])
  encoder = load_text_encoder(tmp_path)
  assert encoder.kind == kind
  ids, mask = padded_batch(3, encoder.module.vocab_size)
  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(ids),
      attention_mask=torch.tensor(mask).long(),
      output_hidden_states=True,
    )
  layers = {kind: out.last_hidden_state}
  if kind == 'clip':
    layers['clip_penultimate'] = out.hidden_states[-2]
  for name, expected in layers.items():
    encoder = load_text_encoder(tmp_path, kind=name)
    found = encode_tokens(encoder.module, encoder.params, ids, mask)
    error = np.abs(found - expected.numpy())[mask].max()
    print(f'{name}: largest error {error:.1e} of {abs(expected).max():.1f}')
    assert error < 1e-5
    assert not np.any(found[~mask])


def full_clip(transformers, folder):
  config = transformers.CLIPConfig(
    text_config=tiny_encoders.config('clip'),
    vision_config=tiny_encoders.SIZES | {'image_size': 8, 'patch_size': 4},
  )
  model = transformers.CLIPModel(config)
  model.save_pretrained(folder)
  return model.text_model


def full_t5gemma(transformers, folder):
  encoder = tiny_encoders.config('t5gemma')['encoder']
  config = transformers.T5GemmaConfig(encoder=encoder, decoder=encoder)
  model = transformers.T5GemmaForConditionalGeneration(config)
  model.save_pretrained(folder)
  return model.model.encoder


def language_model(transformers, folder):
  config = transformers.BertConfig(**tiny_encoders.config('bert'))
  model = transformers.BertForPreTraining(config)
  model.save_pretrained(folder)
  return model.bert


@pytest.mark.parity
@pytest.mark.parametrize(
  'kind, write',
  [('clip', full_clip), ('bert', language_model), ('t5gemma', full_t5gemma)],
)
def test_encoders_inside_larger_models_are_found(kind, write, tmp_path):
  torch = pytest.importorskip('torch')
  import transformers

  tiny_encoders.write(tmp_path, kind)
  model = write(transformers, tmp_path).eval()
  encoder = load_text_encoder(tmp_path)
  ids, mask = padded_batch(4, encoder.module.vocab_size, (9, 4))
  with torch.no_grad():
    out = model(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
  found = encode_tokens(encoder.module, encoder.params, ids, mask)
  error = np.abs(found - out.last_hidden_state.numpy())[mask].max()
  assert error < 1e-5


@pytest.mark.parametrize(
  'kind', ['bert', 't5gemma', 'clip', 'clip_penultimate']
)
def test_padding_gives_zeros_and_changes_nothing_else(kind, tmp_path):
  encoder = loaded(tmp_path, kind)
  module, params = encoder.module, encoder.params
  # Whole vectors of the processor: other lengths are rounded differently.
  ids, mask = padded_batch(1, 40, lengths=(16, 8, 1))
  out = encode_tokens(module, params, ids, mask)
  assert not np.any(out[~mask]) and np.all(np.isfinite(out))
  other = encode_tokens(module, params, np.where(mask, ids, 7), mask)
  np.testing.assert_array_equal(out, other)
  alone = encode_tokens(module, params, ids[1:2, :8], mask[1:2, :8])
  np.testing.assert_allclose(out[1, :8], alone[0], atol=2e-6)
  # A row of padding alone, which fills a batch, is zeros and not NaN.
  none = encode_tokens(module, params, 0 * ids, np.zeros_like(mask))
  np.testing.assert_array_equal(none, 0 * np.asarray(out))


def test_clip_sees_only_the_tokens_before_and_bert_all(tmp_path):
  ids, mask = padded_batch(2, 40, lengths=(6,))
  changed = np.where(np.arange(6) == 3, 39 - ids, ids)
  for kind, before in (('clip', True), ('bert', False), ('t5gemma', False)):
    encoder = loaded(tmp_path / kind, kind)
    a, b = (
      encode_tokens(encoder.module, encoder.params, x, mask)
      for x in (ids, changed)
    )
    assert np.array_equal(a[:, :3], b[:, :3]) == before
    assert np.abs(a[:, 3:] - b[:, 3:]).min(axis=(0, 2)).max() > 0


@pytest.mark.parametrize('kind', CHANGES)
def test_bfloat16_is_close_and_its_output_float32(kind, tmp_path):
  exact = loaded(tmp_path, kind)
  half = load_text_encoder(tmp_path, 'bfloat16')
  ids, mask = padded_batch(3, 40)
  a, b = (encode_tokens(e.module, e.params, ids, mask) for e in (exact, half))
  error = np.linalg.norm(a - b) / np.linalg.norm(a)
  assert b.dtype == jnp.float32 and 0 < error < 0.05
  layers = {k: v[0] for k, v in half.params['layers'].items()}
  for leaf in (half.params | layers).values():
    if not isinstance(leaf, dict):
      assert leaf.dtype == ('bfloat16' if leaf.ndim > 1 else 'float32')


@pytest.mark.parametrize('kind', CHANGES)
def test_no_stack_of_layers_is_converted_on_a_cpu(kind, tmp_path):
  loaded(tmp_path, kind)
  half = load_text_encoder(tmp_path, 'bfloat16')
  stacks = {
    ','.join(map(str, leaf.shape))
    for leaf in jax.tree.leaves(half.params['layers'])
    if leaf.dtype == jnp.bfloat16
  }
  args = half.module, half.params, *padded_batch(3, 40)
  _, program = encode_tokens.lower(*args).compile().as_text().split('\nENTRY ')
  assert len(stacks) >= 2 and all(
    f'bf16[{shape}]' in program for shape in stacks
  )
  assert not [shape for shape in stacks if f'f32[{shape}]' in program]


@pytest.mark.parametrize('kind', CHANGES)
def test_parameters_split_over_devices_give_the_same_embeddings(kind, tmp_path):
  whole = loaded(tmp_path, kind)
  mesh = sharding.make_mesh(2, 4)
  place = functools.partial(sharding.leaf_sharding, mesh=mesh, min_size=64)
  spread = load_text_encoder(tmp_path, place=place)
  assert spread.digest == whole.digest
  large = max(jax.tree.leaves(spread.params), key=lambda leaf: leaf.size)
  assert large.addressable_shards[0].data.size == large.size // 4
  ids, mask = padded_batch(5, 40, (9, 4, 1, 2, 3, 5, 6, 7))
  rows = sharding.put_batch((ids, mask), mesh)
  with jax.set_mesh(mesh):
    out = encode_tokens(spread.module, spread.params, *rows)
  expected = encode_tokens(whole.module, whole.params, ids, mask)
  np.testing.assert_allclose(np.asarray(out), expected, atol=1e-5)
