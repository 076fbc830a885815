"""Token ids: sentencepiece's pieces, </s>, padding, as in transformers."""

import pickle

import numpy as np
import pytest
import sentencepiece

from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.text.tokenizer import EOS, PAD, Tokenizer
from tests import tiny_text
from tests.tiny_text import varied


def check_ids(path, prompts):
  """Compares each row of the tokenizer with sentencepiece's ids."""
  reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
  max_len = 64
  ids, mask, cut = Tokenizer(path)(prompts, max_len)
  for prompt, row, seen, missing in zip(prompts, ids, mask, cut):
    wanted = [*reference.encode(prompt), EOS]
    if missing:
      assert len(wanted) - missing == max_len
      wanted = [*wanted[: max_len - 1], EOS]
    assert list(row[seen]) == wanted
    assert np.all(row[~seen] == PAD) and np.all(np.diff(seen.astype(int)) <= 0)
  return cut


def test_ids_are_sentencepieces_with_eos_and_padding(tmp_path):
  (tmp_path / 'spiece.model').write_bytes(tiny_text.vocabulary())
  cut = check_ids(tmp_path / 'spiece.model', varied(1000))
  assert np.any(cut) and not np.all(cut)


def test_a_long_prompt_keeps_eos_and_says_how_much_was_cut(folder):
  encoder = load_text_encoder(folder)
  long = ' '.join(['red'] * 9)
  ids, mask, cut = encoder.tokenize([long, 'red red'], max_len=5)
  assert ids.shape == mask.shape == (2, 5) and ids.dtype == np.int32
  assert ids[0, -1] == EOS and mask[0].all() and list(cut) == [5, 0]
  assert ids[1, 2] == EOS and list(mask[1]) == [1, 1, 1, 0, 0]


def test_a_tokenizer_can_be_pickled(folder):
  tokenizer = load_text_encoder(folder).tokenizer
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.pieces('a red star') == tokenizer.pieces('a red star')
  assert copy.digest == tokenizer.digest


@pytest.mark.parity
def test_a_folder_with_only_a_tokenizer_json_gives_the_same_ids(
  folder, tmp_path
):
  from transformers import T5Tokenizer

  expected = load_text_encoder(folder).tokenize(varied(50)[4:])[0]
  T5Tokenizer.from_pretrained(folder, extra_ids=0).save_pretrained(folder)
  (folder / 'spiece.model').unlink()
  assert (folder / 'tokenizer.json').exists()
  fast = load_text_encoder(folder).tokenize(varied(50)[4:])[0]
  same = np.mean(np.all(fast == expected, axis=1))
  assert same == 1
