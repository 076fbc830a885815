"""The vocabulary of a small text encoder, learned from its captions."""

import collections
import io
import pathlib
import re
import string
import tempfile
from collections.abc import Iterable
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from imagen_jax.text.tokenizer import EOS, PAD

CHARACTERS = sorted(set(map(chr, range(33, 127))) - set(string.ascii_uppercase))

# (character, its replacement): space, case, quotes.
FOLDS = [
  *((c, ' ') for c in '\t\n\r\u00a0\u2009\u3000'),
  *((c, c.lower()) for c in string.ascii_uppercase),
  *zip('\u2018\u2019\u201c\u201d', '\'\'""'),
]


def train_vocabulary(texts: Iterable[str]) -> bytes:
  """Trains a sentencepiece unigram model with T5's special ids.

  Every word of the captions is a piece. Any other word is split into ASCII
  characters; other characters are <unk>. Text is lower-cased.

  Returns:
    the serialized model.
  """
  lines = [' '.join(re.findall(r'\w+|[^\w\s]', text.lower())) for text in texts]
  words = collections.Counter(filter(str.isalnum, ' '.join(lines).split()))
  out = io.BytesIO()
  with tempfile.TemporaryDirectory() as folder:
    # Seed pieces. Sentencepiece's own are substrings that at least two words
    # share, which would split 'small'.
    seeds = pathlib.Path(folder) / 'seeds.tsv'
    seeds.write_text(
      ''.join(f'▁{word}\t{n}\n' for word, n in sorted(words.items()))
      + ''.join(f'{c}\t1\n' for c in CHARACTERS),
      encoding='utf-8',
    )
    rules = pathlib.Path(folder) / 'rules.tsv'
    rules.write_text(
      ''.join(f'{ord(a):X}\t{ord(b):X}\n' for a, b in FOLDS),
      encoding='utf-8',
    )
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=out,
      model_type='unigram',
      vocab_size=600,
      hard_vocab_limit=False,
      seed_sentencepieces_file=str(seeds),
      required_chars=''.join(CHARACTERS),
      normalization_rule_tsv=str(rules),
      pad_id=PAD,
      eos_id=EOS,
      unk_id=2,
      bos_id=-1,
      num_threads=1,
      minloglevel=2,
    )
  # The model records the paths of its inputs, which differ in every run.
  messages: Any = sentencepiece_model_pb2  # defines its classes when imported
  model = messages.ModelProto.FromString(out.getvalue())
  model.trainer_spec.ClearField('seed_sentencepieces_file')
  model.normalizer_spec.ClearField('normalization_rule_tsv')
  return model.SerializeToString(deterministic=True)
