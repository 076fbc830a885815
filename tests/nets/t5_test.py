"""The T5 encoder against transformers' in torch, live and recorded.

`golden/t5.npz` holds two tiny random T5s under their torch names, a batch with
padding, and transformers' outputs. `python -m tests.nets.t5_test` writes it
(this and `pytest -m parity` need torch and transformers).
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax.nets.t5 import T5Encoder, distance_buckets
from imagen_jax.text import weights
from imagen_jax.text.encoder import encode_tokens, load_text_encoder
from tests import tiny_text

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 't5.npz'
GOLDEN_CONFIG = {
  'vocab_size': 70,
  'd_model': 8,
  'num_layers': 2,
  'num_heads': 2,
  'd_kv': 6,
  'd_ff': 12,
  'relative_attention_num_buckets': 8,
  'relative_attention_max_distance': 12,
}
PROJECTIONS = ('relu', 'gated-gelu')
PARITY_SIZES = {
  'v1.0': {'gated': False},
  'v1.1': {'gated': True},
  'one layer, one head': {'num_layers': 1, 'num_heads': 1},
  'heads wider than the stream': {'num_heads': 4, 'head_dim': 24},
  'few buckets': {'num_buckets': 8, 'max_distance': 20, 'num_layers': 3},
  'wide': {'width': 96, 'num_heads': 6, 'mlp_dim': 200, 'num_layers': 4},
}


def padded_batch(seed, vocab_size, lengths=(50, 17, 3, 1)):
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, vocab_size, (len(lengths), max(lengths)))
  return ids.astype(np.int32), np.arange(max(lengths)) < np.c_[list(lengths)]


def torch_encode(folder, ids, mask):
  """Last hidden states of transformers' T5EncoderModel in float32."""
  torch = pytest.importorskip('torch')
  from transformers import T5EncoderModel

  model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()
    )
  return out.last_hidden_state.numpy()


def tiny(seed=0, dtype=jnp.float32):
  sizes = {'vocab_size': 40, 'width': 16, 'num_layers': 2, 'num_heads': 2}
  module = T5Encoder(**sizes, head_dim=8, mlp_dim=24, dtype=dtype)
  return module, tiny_text.random_params(module, seed)


@pytest.mark.parametrize('projection', PROJECTIONS)
def test_recorded_torch_outputs_are_met_to_1e_5(projection, tmp_path):
  golden = np.load(GOLDEN)
  prefix = projection + '/'
  save_file(
    {k.removeprefix(prefix): golden[k] for k in golden if k.startswith(prefix)},
    tmp_path / weights.SINGLE,
  )
  config = {
    'model_type': 't5',
    **GOLDEN_CONFIG,
    'feed_forward_proj': projection,
  }
  (tmp_path / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'spiece.model').write_bytes(tiny_text.vocabulary())
  encoder = load_text_encoder(tmp_path)
  mask = golden['mask']
  out = encode_tokens(encoder.module, encoder.params, golden['ids'], mask)
  error = np.abs(out - golden['expected_' + projection])[mask].max()
  assert error < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize('name', PARITY_SIZES)
def test_torch_and_flax_agree_to_1e_5_with_padding(name, tmp_path):
  seed = len(name)
  tiny_text.random_folder(tmp_path, seed, **PARITY_SIZES[name])
  encoder = load_text_encoder(tmp_path)
  ids, mask = padded_batch(seed, encoder.module.vocab_size)
  out = np.asarray(encode_tokens(encoder.module, encoder.params, ids, mask))
  error = np.abs(out - torch_encode(tmp_path, ids, mask))[mask].max()
  print(
    f'{name}: largest error {error:.1e}, largest value {abs(out).max():.1f}'
  )
  assert error < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize('num_buckets', (8, 32, 64))
@pytest.mark.parametrize('max_distance', (20, 100, 128, 256))
def test_distance_buckets_are_torchs(num_buckets, max_distance):
  torch = pytest.importorskip('torch')
  from transformers.models.t5.modeling_t5 import T5Attention

  position = torch.arange(600)
  expected = T5Attention._relative_position_bucket(
    position[None] - position[:, None], True, num_buckets, max_distance
  )
  ours = distance_buckets(
    600, num_buckets=num_buckets, max_distance=max_distance
  )
  np.testing.assert_array_equal(ours, expected.numpy())


def test_near_distances_have_their_own_bucket_and_far_ones_share():
  row = distance_buckets(400, num_buckets=32, max_distance=128)[200]
  assert list(row[193:208]) == [7, 6, 5, 4, 3, 2, 1, 0, *range(17, 24)]
  assert row[200 - 16] == 10 and row[200 + 16] == 26  # twice 8, 2 of 8 octaves
  assert set(row[:70]) == {15} and set(row[330:]) == {31}


def test_padding_gives_zeros_and_changes_nothing_else():
  module, params = tiny()
  ids, mask = padded_batch(1, 40, lengths=(9, 4, 1))
  out = encode_tokens(module, params, ids, mask)
  assert not np.any(out[~mask])
  other = encode_tokens(module, params, np.where(mask, ids, 7), mask)
  np.testing.assert_array_equal(out, other)
  alone = encode_tokens(module, params, ids[1:2, :4], mask[1:2, :4])
  np.testing.assert_allclose(out[1, :4], alone[0], atol=2e-6)


def test_a_row_of_padding_alone_is_zeros_with_zero_gradient_and_not_nan():
  module, params = tiny()
  ids, mask = np.zeros((2, 5), np.int32), np.zeros((2, 5), bool)

  def total(params):
    out = encode_tokens(module, params, ids, mask)
    return jnp.sum(out), out

  (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  np.testing.assert_array_equal(out, np.zeros((2, 5, 16)))
  assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


def test_order_matters():
  module, params = tiny()
  ids, mask = padded_batch(2, 40, lengths=(6,))
  out = encode_tokens(module, params, ids, mask)
  turned = encode_tokens(module, params, ids[:, ::-1], mask)
  assert np.abs(out[:, ::-1] - turned).max() > 0.01


def test_layers_are_stacked_and_differ_at_the_start():
  module, _ = tiny()
  ids = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(module.init)(jax.random.key(0), ids, ids == 0)['params']
  query = params['layers']['query']
  assert query.shape == (2, 16, 2, 8)
  assert np.abs(query[0] - query[1]).max() > 0.01


def test_bfloat16_is_close_and_its_output_float32():
  module, params = tiny()
  ids, mask = padded_batch(3, 40)
  exact = encode_tokens(module, params, ids, mask)
  half = encode_tokens(module.clone(dtype=jnp.bfloat16), params, ids, mask)
  assert half.dtype == jnp.float32
  error = np.abs(half - exact)[mask].max()
  assert 0 < error < 0.1


def test_bfloat16_keeps_the_residual_stream_in_float32():
  # Embeddings 2000 times as large as the layers' outputs: a residual stream in
  # bfloat16, with 8 bits of precision, would round those away.
  module, params = tiny()
  params['embedding'] = 2000 * np.asarray(
    params['embedding'].astype(jnp.bfloat16), np.float32
  )
  ids, mask = padded_batch(4, 40, lengths=(8, 5))

  def added(dtype):
    """The layers' contribution to the output, after the last norm."""
    m = module.clone(dtype=dtype)
    none = params | {
      'layers': params['layers']
      | {k: 0 * params['layers'][k] for k in ('out', 'mlp_out')}
    }
    out, without = (encode_tokens(m, p, ids, mask) for p in (params, none))
    return (out - without)[mask]

  exact, half = added(jnp.float32), added(jnp.bfloat16)
  assert np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


def make_golden():
  """Writes `golden/t5.npz` from transformers' T5EncoderModel."""
  import torch
  from transformers import T5Config, T5EncoderModel

  lengths = (14, 5, 1)
  ids, mask = padded_batch(0, GOLDEN_CONFIG['vocab_size'], lengths)
  arrays = {'ids': ids, 'mask': mask}
  for seed, projection in enumerate(PROJECTIONS):
    torch.manual_seed(seed)
    model = T5EncoderModel(
      T5Config(**GOLDEN_CONFIG, feed_forward_proj=projection)
    ).eval()
    with torch.no_grad():
      for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
      out = model(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()
      )
    arrays['expected_' + projection] = out.last_hidden_state.numpy()
    for name, tensor in model.state_dict().items():
      if name != 'encoder.embed_tokens.weight':
        arrays[f'{projection}/{name}'] = tensor.numpy()
  np.savez_compressed(GOLDEN, **arrays)


if __name__ == '__main__':
  make_golden()
