"""Weights, tokenizer and the frozen encoder."""

import functools
import json
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file

from imagen_jax import sharding
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.nets.t5 import SIZES, T5Encoder
from imagen_jax.text import weights
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.text.tokenizer import EOS, PAD, Tokenizer
from imagen_jax.worlds import captions, shapes
from imagen_jax.worlds.vocabulary import train_vocabulary
from tests import tiny_text

# A real T5's spiece.model, and a file of prompts, a line each.
REAL = pathlib.Path(os.environ.get('T5_VOCABULARY', 'spiece.model'))
PROMPTS = pathlib.Path(os.environ.get('T5_PROMPTS', 'prompts.txt'))
needs_real = pytest.mark.skipif(
  not REAL.exists(), reason='set T5_VOCABULARY to a real spiece.model'
)


@pytest.fixture
def folder(tmp_path):
  """A random T5 folder; tests spoil it as they like."""
  tiny_text.random_folder(tmp_path / 't5')
  return tmp_path / 't5'


def shard(folder, parts=2):
  """Splits a folder's weights over several files, as large models come."""
  tensors = load_file(folder / weights.SINGLE)
  (folder / weights.SINGLE).unlink()
  names = sorted(tensors)
  index = {}
  for i in range(parts):
    part = names[i::parts]
    file = f'model-{i + 1:05d}-of-{parts:05d}.safetensors'
    save_file({name: tensors[name] for name in part}, folder / file)
    index |= dict.fromkeys(part, file)
  (folder / f'{weights.SINGLE}.index.json').write_text(
    json.dumps({'weight_map': index})
  )


def change(folder, spoil):
  """Rewrites the weights after `spoil(tensors)`."""
  tensors = load_file(folder / weights.SINGLE)
  spoil(tensors)
  save_file(tensors, folder / weights.SINGLE)


# ---- Weights ---------------------------------------------------------------


@pytest.mark.parametrize('gated', (False, True))
def test_saving_and_loading_is_the_identity_to_the_bit(gated, tmp_path):
  _, params = tiny_text.random_folder(tmp_path, gated=gated)
  loaded = load_text_encoder(tmp_path).params
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_shards_are_read_as_one_model_with_one_digest(folder):
  whole = load_text_encoder(folder)
  shard(folder)
  parts = load_text_encoder(folder)
  jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
  assert parts.digest == whole.digest


@pytest.mark.parametrize('dtype', (ml_dtypes.bfloat16, np.float16))
def test_half_precision_files_are_read_exactly(dtype, folder):
  exact = load_text_encoder(folder).params
  change(folder, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
  loaded = load_text_encoder(folder).params
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(
      a, np.asarray(b).astype(dtype).astype(np.float32)
    ),
    loaded,
    exact,
  )


def test_bfloat16_holds_matrices_in_half_the_memory_and_norms_in_full(folder):
  params = load_text_encoder(folder, 'bfloat16').params
  full = {'norm', 'distance_bias'}
  assert {
    k for k, v in params.items() if k != 'layers' and v.dtype == 'float32'
  } == full
  for name, value in params['layers'].items():
    assert value.dtype == ('float32' if name.endswith('norm') else 'bfloat16')


def test_the_decoder_of_a_full_t5_is_left_out(folder):
  digest = load_text_encoder(folder).digest
  more = {
    'decoder.block.0.layer.0.layer_norm.weight': np.ones(16, np.float32),
    'decoder.embed_tokens.weight': np.ones((80, 16), np.float32),
    'lm_head.weight': np.ones((80, 16), np.float32),
  }
  change(folder, lambda tensors: tensors.update(more))
  assert load_text_encoder(folder).digest == digest


def test_the_embedding_table_is_known_under_both_its_names(folder):
  exact = load_text_encoder(folder)
  change(folder, lambda t: t.update({weights.ALIAS: t.pop('shared.weight')}))
  alias = load_text_encoder(folder)
  jax.tree.map(np.testing.assert_array_equal, exact.params, alias.params)
  assert exact.digest == alias.digest


Q = 'encoder.block.1.layer.0.SelfAttention.q.weight'


@pytest.mark.parametrize(
  'spoil, said',
  [
    (lambda t: t.pop(Q), Q),
    (lambda t: t.update({'encoder.block.2.x': t[Q]}), 'encoder.block.2.x'),
    (lambda t: t.update({Q: t[Q][:, :-1].copy()}), Q),
    (lambda t: t.update({Q: t[Q].astype(np.int32)}), Q),
  ],
  ids=['missing', 'unknown', 'misshapen', 'of whole numbers'],
)
def test_a_wrong_tensor_is_refused_by_name(spoil, said, folder):
  change(folder, spoil)
  with pytest.raises(ModelError, match=said.replace('.', r'\.')):
    load_text_encoder(folder)


def cut_short(folder):
  path = folder / weights.SINGLE
  path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
  (folder / weights.SINGLE).rename(folder / 'pytorch_model.bin')


def lose_shard(folder):
  shard(folder)
  (folder / 'model-00002-of-00002.safetensors').unlink()


def edit_config(**values):
  def edit(folder):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | values))

  return edit


@pytest.mark.parametrize(
  'spoil, said',
  [
    (cut_short, 'damaged or incomplete'),
    (pickled, 'pytorch_model.bin is a pickle'),
    (lose_shard, 'model-00002-of-00002.safetensors'),
    (lambda f: (f / weights.SINGLE).unlink(), 'neither model.safetensors'),
    (lambda f: (f / weights.SINGLE).write_bytes(b'{}'), 'no safetensors'),
    (lambda f: (f / 'config.json').unlink(), 'config.json does not exist'),
    (lambda f: (f / 'config.json').write_text('{'), 'as JSON'),
    (lambda f: (f / 'spiece.model').unlink(), 'spiece.model'),
    (lambda f: (f / 'spiece.model').write_bytes(b'x'), 'spiece.model'),
    (edit_config(model_type='bert'), "'bert'"),
    (edit_config(feed_forward_proj='gated-silu'), 'gated-silu'),
    (edit_config(d_model=None), 'd_model'),
    (edit_config(d_ff=25), 'wi_0'),
    (edit_config(vocab_size=20), 'embedding table of 20'),
  ],
)
def test_a_folder_that_is_no_t5_is_refused_in_a_sentence(spoil, said, folder):
  spoil(folder)
  with pytest.raises(ModelError, match=said):
    load_text_encoder(folder)


def test_the_digest_names_weights_vocabulary_and_sizes(folder):
  digests = {load_text_encoder(folder).digest}
  assert load_text_encoder(folder, 'bfloat16').digest in digests

  def nudge(tensors):
    tensors[Q][0, 0] += 1e-6

  for spoil in (
    lambda f: change(f, nudge),
    edit_config(layer_norm_epsilon=1e-5),
    lambda f: (f / 'spiece.model').write_bytes(
      train_vocabulary(['a red star'] * 9)
    ),
  ):
    spoil(folder)
    digests.add(load_text_encoder(folder).digest)
  assert len(digests) == 4


def test_sharded_loading_is_the_identity_to_the_bit(folder):
  shard(folder)
  mesh = sharding.make_mesh(2, 4)
  place = functools.partial(sharding.leaf_sharding, mesh=mesh, min_size=64)
  whole = load_text_encoder(folder, 'bfloat16')
  spread = load_text_encoder(folder, 'bfloat16', place=place)
  assert spread.digest == whole.digest
  query = spread.params['layers']['query']
  assert query.addressable_shards[0].data.size == query.size // 4
  for a, b in zip(
    jax.tree.leaves(whole.params), jax.tree.leaves(spread.params)
  ):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  # In float32: bfloat16 products are summed in another order over devices.
  np.testing.assert_allclose(
    load_text_encoder(folder, place=place).encode(['a red circle'])[0],
    load_text_encoder(folder).encode(['a red circle'])[0],
    atol=1e-5,
  )


def test_t5_xxl_has_4_76_billion_parameters():
  module = T5Encoder(**SIZES['xxl'])
  ids = jax.ShapeDtypeStruct((1, 2), np.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids)
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert abs(count - 4.76e9) < 0.005e9


MEMORY = """
import ctypes, functools, os, re, sys
os.environ['JAX_PLATFORMS'] = 'cpu'
import jax, numpy as np
from imagen_jax import sharding
from imagen_jax.text import weights
from imagen_jax.text.encoder import load_text_encoder
jax.config.update('jax_num_cpu_devices', 4)
mesh = sharding.make_mesh(1, 4)
place = functools.partial(sharding.leaf_sharding, mesh=mesh)
small, large = sys.argv[1:]
load_text_encoder(small, 'bfloat16', place=place)  # compiles, imports
ctypes.CDLL('libc.so.6').malloc_trim(0)
status = lambda key: 1024 * int(
  re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]
)
before = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts anew
params = load_text_encoder(large, 'bfloat16', place=place).params
held = sum(
  shard.data.nbytes
  for leaf in jax.tree.leaves(params)
  for shard in leaf.addressable_shards
)
print(status('VmHWM') - before - held)
"""


@pytest.mark.slow
@pytest.mark.skipif(
  not os.access('/proc/self/clear_refs', os.W_OK), reason='needs Linux'
)
def test_loading_shards_takes_no_more_host_memory_than_one_of_them(tmp_path):
  """On CPU the devices' memory is the host's, so it is subtracted."""
  size = dict(num_layers=16, num_heads=16, head_dim=64, width=1024)
  for name, layers in (('small', 1), ('large', 16)):
    size['num_layers'] = layers
    tiny_text.random_folder(tmp_path / name, mlp_dim=2816, gated=True, **size)
    shard(tmp_path / name, 8)
  largest = max(f.stat().st_size for f in (tmp_path / 'large').glob('*-of-*'))
  result = subprocess.run(
    [sys.executable, '-c', MEMORY, tmp_path / 'small', tmp_path / 'large'],
    capture_output=True,
    text=True,
    check=True,
  )
  extra = int(result.stdout)
  print(
    f'{extra / 2**20:.0f} MiB beside the parameters; a shard file has '
    f'{largest / 2**20:.0f}'
  )
  assert extra < 1.2 * largest


# ---- Tokenizer -------------------------------------------------------------


def varied(number, seed=0):
  """Strings of every kind a person or a page might send."""
  rng = random.Random(seed)
  words = sorted(captions.vocabulary()) + (
    "photograph oil painting Astronaut Über naïve 東京 поезд 🙂 don't "
    'e-mail 3.14 $5 A.I. ½ ﬁne zero\u00a0width\u200bspace'
  ).split(' ')
  ends = ['', '.', '!', ' ', '\n', '\t…', ' \u3000']
  out = ['', ' ', '\n', 'a' * 300]
  for _ in range(number - len(out)):
    kind = rng.random()
    if kind < 0.7:
      text = rng.choice((' ', ' ', ', ', '  ')).join(
        rng.choices(words, k=rng.randint(1, 20))
      )
      text = rng.choice((str, str.upper, str.title))(text) + rng.choice(ends)
    elif kind < 0.85:
      text = ''.join(
        map(chr, rng.choices(range(32, 127), k=rng.randint(1, 60)))
      )
    else:
      code = (rng.randint(1, 0xD7FF) for _ in range(rng.randint(1, 30)))
      text = ''.join(map(chr, code))
    out.append(text)
  return out


def check_ids(path, prompts):
  """The tokenizer's rows against sentencepiece's ids, one by one."""
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


@needs_real
def test_ids_of_the_real_model_are_sentencepieces_on_10000_strings():
  prompts = PROMPTS.read_text('utf-8').splitlines() if PROMPTS.exists() else []
  check_ids(REAL, (prompts + varied(10_000))[: max(10_000, len(prompts))])


@needs_real
def test_ids_of_the_real_model_are_those_t5_was_trained_with():
  ids, mask, _ = Tokenizer(REAL)(
    ['translate English to German:', 'summarize:'], 8
  )
  assert list(ids[0, :6]) == [13959, 1566, 12, 2968, 10, 1]
  assert list(ids[1, :4]) == [21603, 10, 1, 0]
  assert list(mask.sum(1)) == [6, 3]


def test_a_long_prompt_keeps_eos_and_says_how_much_was_cut(folder):
  encoder = load_text_encoder(folder)
  long = ' '.join(['red'] * 9)
  ids, mask, cut = encoder.tokenize([long, 'red red'], max_len=5)
  assert ids.shape == mask.shape == (2, 5) and ids.dtype == np.int32
  assert ids[0, -1] == EOS and mask[0].all() and list(cut) == [5, 0]
  assert ids[1, 2] == EOS and list(mask[1]) == [1, 1, 1, 0, 0]


def test_a_tokenizer_travels_to_workers(folder):
  tokenizer = load_text_encoder(folder).tokenizer
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.pieces('a red star') == tokenizer.pieces('a red star')
  assert copy.digest == tokenizer.digest


# ---- Encoder ---------------------------------------------------------------


def test_embeddings_are_zero_at_padding_and_do_not_depend_on_company(folder):
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


# ---- Against transformers --------------------------------------------------


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


@pytest.mark.parity
@needs_real
def test_ids_of_the_real_model_are_transformers_too(tmp_path):
  from transformers import T5Tokenizer

  shutil.copy(REAL, tmp_path / 'spiece.model')
  theirs = T5Tokenizer.from_pretrained(tmp_path)
  prompts = PROMPTS.read_text('utf-8').splitlines() if PROMPTS.exists() else []
  prompts += [shapes.scene(0, 'eval', i).caption for i in range(1000)]
  ours = Tokenizer(REAL)
  differ = [p for p in prompts if [*ours.pieces(p), EOS] != theirs(p).input_ids]
  assert differ == []
