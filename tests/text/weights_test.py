"""T5 weights in Hugging Face folders: read exactly, or refused by name."""

import functools
import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from imagen_jax import sharding
from imagen_jax.errors import ModelError
from imagen_jax.text import weights
from imagen_jax.text.encoder import load_text_encoder
from tests import tiny_text


def shard(folder, parts=2):
  """Splits a folder's weights over several files, as in large models."""
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
  alias = 'encoder.embed_tokens.weight'
  change(folder, lambda t: t.update({alias: t.pop('shared.weight')}))
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
    (cut_short, 'model.safetensors'),
    (pickled, 'pytorch_model.bin'),
    (lose_shard, 'model-00002-of-00002.safetensors'),
    (lambda f: (f / weights.SINGLE).unlink(), 'model.safetensors'),
    (lambda f: (f / weights.SINGLE).write_bytes(b'{}'), 'model.safetensors'),
    (lambda f: (f / 'config.json').unlink(), 'config.json'),
    (lambda f: (f / 'config.json').write_text('{'), 'config.json'),
    (lambda f: (f / 'spiece.model').unlink(), 'spiece.model'),
    (lambda f: (f / 'spiece.model').write_bytes(b'x'), 'spiece.model'),
    (edit_config(model_type='gpt2'), 'model_type'),
    (edit_config(feed_forward_proj='gated-silu'), 'feed_forward_proj'),
    (edit_config(feed_forward_proj=['relu']), 'feed_forward_proj'),
    (edit_config(layer_norm_epsilon='1e-6'), 'layer_norm_epsilon'),
    (edit_config(layer_norm_epsilon=None), 'layer_norm_epsilon'),
    (
      lambda f: (f / 'tokenizer_config.json').write_text(
        '{"model_max_length": "512"}'
      ),
      'model_max_length',
    ),
    (edit_config(d_model=None), 'd_model'),
    (edit_config(d_ff=25), 'wi_0'),
    (edit_config(vocab_size=20), 'vocab_size'),
  ],
)
def test_a_folder_that_is_no_t5_is_refused_by_file_or_key(spoil, said, folder):
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
    lambda f: (f / 'spiece.model').write_bytes(tiny_text.vocabulary(seed=1)),
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
  """On CPU device memory is host memory, so it is subtracted."""
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
