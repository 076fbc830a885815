"""Token ids: pieces between special tokens, padding, as in transformers."""

import json
import pickle

import numpy as np
import pytest
import sentencepiece

from imagen_jax.errors import ModelError
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.text.tokenizer import EOS, PAD, Tokenizer, load_tokenizer
from tests import tiny_encoders, tiny_text
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


@pytest.mark.parametrize('kind', ['bert', 'clip'])
def test_special_tokens_are_kept_and_counted_in_the_length(kind, tmp_path):
  text = tiny_encoders.TOKENIZERS[kind]()
  (tmp_path / 'tokenizer.json').write_text(text)
  tokenizer = load_tokenizer(tmp_path)
  names = {t['content']: t['id'] for t in json.loads(text)['added_tokens']}
  start, end, pad = {
    'bert': ('[CLS]', '[SEP]', '[PAD]'),
    'clip': ('<|startoftext|>', '<|endoftext|>', '<|endoftext|>'),
  }[kind]
  ids, mask, cut = tokenizer(['a a a a a', '', 'a'], 5)
  a = tokenizer.pieces('a')
  assert len(a) == 1 and list(cut) == [2, 0, 0]
  assert list(ids[0]) == [names[start], *3 * a, names[end]]
  assert list(ids[1]) == [names[start], names[end]] + 3 * [names[pad]]
  assert [list(row) for row in mask.astype(int)] == [
    [1, 1, 1, 1, 1],
    [1, 1, 0, 0, 0],
    [1, 1, 1, 0, 0],
  ]
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.pieces('a red star') == tokenizer.pieces('a red star')


def test_truncation_and_padding_stored_in_a_tokenizer_json_have_no_effect(
  tmp_path,
):
  stored = json.loads(tiny_encoders.wordpiece())
  (tmp_path / 'tokenizer.json').write_text(json.dumps(stored))
  expected = load_tokenizer(tmp_path)(['a ' * 30, 'a'], 40)
  stored['truncation'] = {
    'max_length': 8,
    'strategy': 'LongestFirst',
    'stride': 0,
    'direction': 'Right',
  }
  stored['padding'] = {
    'strategy': {'Fixed': 8},
    'direction': 'Right',
    'pad_to_multiple_of': None,
    'pad_id': 0,
    'pad_type_id': 0,
    'pad_token': '[PAD]',
  }
  (tmp_path / 'tokenizer.json').write_text(json.dumps(stored))
  for a, b in zip(load_tokenizer(tmp_path)(['a ' * 30, 'a'], 40), expected):
    np.testing.assert_array_equal(a, b)


def test_a_tokenizer_json_that_adds_no_special_token_is_refused(tmp_path):
  stored = json.loads(tiny_encoders.wordpiece()) | {'post_processor': None}
  (tmp_path / 'tokenizer.json').write_text(json.dumps(stored))
  with pytest.raises(ModelError):
    load_tokenizer(tmp_path)


def old_bert(folder):
  vocabulary = json.loads(tiny_encoders.wordpiece(cased=True))['model']['vocab']
  pieces = sorted(vocabulary, key=vocabulary.get)
  (folder / 'vocab.txt').write_text('\n'.join(pieces) + '\n')
  settings = {'do_lower_case': False, 'model_max_length': 512}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def old_clip(folder):
  stored = json.loads(tiny_encoders.byte_pairs())['model']
  (folder / 'vocab.json').write_text(json.dumps(stored['vocab']))
  lines = ['#version: 0.2', *map(' '.join, stored['merges'])]
  (folder / 'merges.txt').write_text('\n'.join(lines) + '\n')


def new(kind, **options):
  def write(folder):
    text = tiny_encoders.TOKENIZERS[kind](**options)
    (folder / 'tokenizer.json').write_text(text)
    if options:
      settings = {'do_lower_case': False}
      (folder / 'tokenizer_config.json').write_text(json.dumps(settings))

  return write


def sentencepieces(folder):
  (folder / 'spiece.model').write_bytes(tiny_text.vocabulary())


# Where transformers differs from sentencepiece, with which T5 was trained:
# special tokens in a caption, U+0085, a composed letter with one more mark.
NOT_T5 = ('</s>', '<pad>', '<unk>', '\x85', '\u0301')


@pytest.mark.parity
@pytest.mark.parametrize(
  'name, write, excluded',
  [
    ('BertTokenizer', new('bert'), ()),
    ('BertTokenizer', new('bert', cased=True), ()),
    ('BertTokenizer', old_bert, ()),
    ('CLIPTokenizer', new('clip'), ()),
    ('CLIPTokenizer', old_clip, ()),
    ('GemmaTokenizer', new('t5gemma'), ()),
    ('T5Tokenizer', sentencepieces, NOT_T5),
  ],
)
def test_ids_are_those_of_transformers_on_10_000_strings(
  name, write, excluded, tmp_path
):
  import transformers

  write(tmp_path)
  options = {'extra_ids': 0} if name == 'T5Tokenizer' else {}
  reference = getattr(transformers, name).from_pretrained(tmp_path, **options)
  strings = tiny_encoders.strings(10_000 + 3000 * bool(excluded))
  strings = [s for s in strings if not any(x in s for x in excluded)]
  assert len(strings) >= 10_000
  wanted = reference(
    strings,
    padding='max_length',
    padding_side='right',
    truncation=True,
    max_length=64,
  )
  ids, mask, cut = load_tokenizer(tmp_path)(strings, 64)
  np.testing.assert_array_equal(ids, wanted['input_ids'])
  np.testing.assert_array_equal(mask, wanted['attention_mask'])
  assert 0 < np.count_nonzero(cut) < len(strings) / 2


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
