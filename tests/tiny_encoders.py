"""Small random BERTs and CLIPs with trained tokenizers, made without torch."""

import functools
import json
import pathlib
import random

import numpy as np
from safetensors.numpy import save_file
from tokenizers import (
  Regex,
  Tokenizer,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from imagen_jax.text import kinds, weights
from tests.tiny_text import varied

SIZES = {
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
}
EMOJI = '🙂 🏳️‍🌈 👨‍👩‍👧‍👦 🇫🇷 👍🏽 ☃ 🀄 𝔘𝔫𝔦 𠜎 e\u0301 ﷽ \u202e\ufeff'.split(' ')


def strings(number, seed=0):
  """Unicode, emoji, long, empty, control characters, special tokens."""
  rng = random.Random(seed)
  special = '[CLS] [SEP] [MASK] <|endoftext|> <|startoftext|> </s> <pad>'
  out = varied(number // 2, seed)
  out += ['the quick brown fox ' * 500, 'é' * 5000, '🙂' * 3000, '\0', '\x7f\r']
  while len(out) < number:
    kind, length = rng.random(), rng.randint(1, 12)
    if kind < 0.4:
      parts = rng.choices(EMOJI + varied(20, rng.random())[4:], k=length)
      out.append(rng.choice(('', ' ')).join(parts))
    elif kind < 0.6:  # control characters between letters
      codes = [*range(32), *range(127, 160), 0x2028, 0x200B, 97, 98, 99]
      out.append(''.join(map(chr, rng.choices(codes, k=length))))
    elif kind < 0.9:  # all planes but the surrogates
      codes = (rng.randint(0, 0x10FFFF) for _ in range(length))
      out.append(''.join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
    else:
      words = special.split() + ['a', 'red', "it's", '99', '…']
      out.append(rng.choice(('', ' ')).join(rng.choices(words, k=length)))
  return out[:number]


@functools.cache
def wordpiece(cased=False):
  """A tokenizer.json of BERT's form, of 600 pieces."""
  made = Tokenizer(models.WordPiece(unk_token='[UNK]'))
  made.normalizer = normalizers.BertNormalizer(lowercase=not cased)
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  names = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  trainer = trainers.WordPieceTrainer(
    vocab_size=600,
    special_tokens=names,
    continuing_subword_prefix='##',
    limit_alphabet=300,
    show_progress=False,
  )
  made.train_from_iterator(strings(2000, 1), trainer)
  made.post_processor = processors.TemplateProcessing(
    single='[CLS] $A [SEP]',
    special_tokens=[(n, names.index(n)) for n in ('[CLS]', '[SEP]')],
  )
  return made.to_str()


@functools.cache
def byte_pairs():
  """A tokenizer.json of CLIP's form: byte pairs, of 800 pieces."""
  made = Tokenizer(
    models.BPE(unk_token='<|endoftext|>', end_of_word_suffix='</w>')
  )
  made.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      normalizers.Replace(Regex(r'\s+'), ' '),
      normalizers.Lowercase(),
    ]
  )
  pattern = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(pattern), 'removed', invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=800,
    end_of_word_suffix='</w>',
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=['<|startoftext|>', '<|endoftext|>'],
    show_progress=False,
  )
  made.train_from_iterator(strings(2000, 2), trainer)
  ends = [
    (n, made.token_to_id(n)) for n in ('<|endoftext|>', '<|startoftext|>')
  ]
  made.post_processor = processors.RobertaProcessing(
    *ends, trim_offsets=False, add_prefix_space=False
  )
  return made.to_str()


@functools.cache
def gemma():
  """A tokenizer.json of Gemma's form: byte pairs, bytes where none fits."""
  made = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True))
  made.normalizer = normalizers.Replace(' ', '▁')
  made.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
  names = ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>']
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=names,
    limit_alphabet=200,
    show_progress=False,
  )
  made.train_from_iterator((s[:200] for s in strings(1000, 3)), trainer)
  made.post_processor = processors.TemplateProcessing(
    single='<bos> $A', special_tokens=[('<bos>', names.index('<bos>'))]
  )
  stored = json.loads(made.to_str())
  vocabulary = stored['model']['vocab']
  for i in range(256):
    vocabulary[f'<0x{i:02X}>'] = len(vocabulary)
  stored['model']['byte_fallback'] = True
  return json.dumps(stored)


TOKENIZERS = {'bert': wordpiece, 'clip': byte_pairs, 't5gemma': gemma}
GEMMA = {'num_key_value_heads': 1, 'head_dim': 8, 'query_pre_attn_scalar': 5}


def config(kind, **changes):
  """The config.json of a small encoder."""
  vocabulary = json.loads(TOKENIZERS[kind]())['model']['vocab']
  sizes = SIZES | {'vocab_size': len(vocabulary)}
  if kind == 't5gemma':
    return {'model_type': kind, 'encoder': sizes | GEMMA | changes}
  kind = {'clip': 'clip_text_model'}.get(kind, kind)
  return sizes | {'model_type': kind} | changes


def write(folder, kind, seed=0, **changes):
  """Writes a random encoder as a Hugging Face folder; returns its tensors."""
  folder = pathlib.Path(folder)
  folder.mkdir(exist_ok=True)
  written = config(kind, **changes)
  (folder / 'config.json').write_text(json.dumps(written))
  (folder / 'tokenizer.json').write_text(TOKENIZERS[kind]())
  module = kinds.module_from_config(folder, written)
  rng, tensors = np.random.default_rng(seed), {}
  tree = weights.abstract_params(module)
  layers = tree.pop('layers')
  shapes = {name: leaf.shape for name, leaf in tree.items()}
  for name, leaf in layers.items():
    for i in range(leaf.shape[0]):
      shapes[f'{module.PREFIX}.{i}.{name}'] = leaf.shape[1:]
  for name, shape in shapes.items():
    value = rng.normal(size=shape) / shape[-1] ** 0.5
    if 'norm' in name.lower() and name.endswith('weight'):
      value = 1 + 0.3 * value
    tensors[name] = value.astype(np.float32)
  save_file(tensors, folder / weights.SINGLE, {'format': 'pt'})
  return tensors
