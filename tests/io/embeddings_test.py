"""Embeddings as bytes: what comes back is what was stored, rounded once."""

import ml_dtypes
import numpy as np
import pytest

from imagen_jax.io import embeddings


def rows(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('store', embeddings.STORES)
def test_a_record_gives_back_its_captions_without_padding(store):
  captions = [rows(5, 8), rows(0, 8), rows(1, 8, seed=1)]
  packed = [embeddings.pack_caption(one, store) for one in captions]
  record = embeddings.pack(packed)
  found = embeddings.unpack(record, 8, store)
  numbers = 6 * 8 * embeddings.BYTES[store] + (store == 'int8') * 6 * 4
  assert len(record) == 4 * (1 + 3) + numbers
  for mine, one in zip(found, captions, strict=True):
    assert mine.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
      mine.astype(np.float32), embeddings.rounded(one, store)
    )


def test_bfloat16_rounds_to_eight_bits_and_int8_to_half_a_step():
  emb = rows(2, 7, 64)
  exact = emb.astype(ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(embeddings.rounded(emb, 'bfloat16'), exact)
  step = np.abs(emb).max(-1, keepdims=True) / 127
  # Half a step, and what bfloat16 then rounds off: half of 2^-7 of the number.
  error = np.abs(embeddings.rounded(emb, 'int8') - emb)
  assert np.all(error <= step / 2 + np.abs(emb) * 2**-8 + step * 2**-8)
  assert np.max(error / step) > 0.4


def test_padding_and_a_token_of_zeros_stay_zeros():
  for store in embeddings.STORES:
    emb = np.zeros((2, 3, 4), np.float32)
    emb[0, 0] = 5
    np.testing.assert_array_equal(embeddings.rounded(emb, store) != 0, emb != 0)


@pytest.mark.parametrize('store', embeddings.STORES)
def test_a_record_of_another_length_is_damaged(store):
  record = embeddings.pack([embeddings.pack_caption(rows(5, 8), store)])
  for bad in (record[:-1], record + b'0', record[:6], b'', b'\xff' * 40):
    with pytest.raises(ValueError):
      embeddings.unpack(bad, 8, store)
