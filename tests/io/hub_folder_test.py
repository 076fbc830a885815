"""Folders in Hugging Face layout from untrusted sources."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax.errors import ModelError
from imagen_jax.io import hub_folder

INDEX = 'model.safetensors.index.json'


def add(folder, file, **values):
  """Saves scalars {tensor: value} as a file of weights."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file({n: np.float16([v]) for n, v in values.items()}, folder / file)


def index(folder, weight_map, name=INDEX):
  (folder / name).write_text(json.dumps({'weight_map': weight_map}))


def read(folder):
  """{tensor: value}."""
  tensors = hub_folder.open_tensors(folder, 'model', what='', convert='')
  return {name: float(tensor.read()[0]) for name, tensor in tensors.items()}


@pytest.mark.parametrize('leave', ['../b/', 'sub/../../b/', '{}/b/'])
def test_an_index_names_no_file_outside_its_folder(tmp_path, leave):
  add(tmp_path / 'b', 'x.safetensors', w=1)
  add(tmp_path / 'a', 'x.safetensors', w=1)
  (tmp_path / 'a' / 'sub').mkdir()
  index(tmp_path / 'a', {'w': leave.format(tmp_path) + 'x.safetensors'})
  with pytest.raises(ModelError, match=INDEX):
    read(tmp_path / 'a')


@pytest.mark.parametrize(
  'weight_map',
  [
    None, 3, [], ['x.safetensors'], {}, {'w': 3}, {'w': ['x.safetensors']},
    {'w': ''}, {'w': '.'}, {'w': 'x\0'}, {'w': 'x' * 5000}, {'w': '..\\x'},
    {'other': 'x.safetensors'},
  ],
)  # fmt: skip
def test_an_index_that_lists_no_files_is_named(tmp_path, weight_map):
  add(tmp_path, 'x.safetensors', w=1)
  index(tmp_path, weight_map)
  with pytest.raises(ModelError, match=INDEX):
    read(tmp_path)


def test_the_index_says_which_file_has_a_tensor(tmp_path):
  add(tmp_path, 'x.safetensors', v=1, w=2)
  add(tmp_path, 'y.safetensors', v=3, w=4)
  index(tmp_path, {'v': 'y.safetensors', 'w': 'x.safetensors'})
  assert read(tmp_path) == {'v': 3, 'w': 2}


@pytest.mark.parametrize(
  'name',
  [
    'model.safetensors.index.fp16.json',  # transformers, diffusers
    'model.safetensors.fp16.index.json',  # older diffusers
    'model.fp16.safetensors.index.json',
  ],
)
@pytest.mark.parametrize('other_index', [False, True])
def test_shards_of_the_only_variant_are_read(tmp_path, name, other_index):
  shards = [f'model.fp16-0000{i}-of-00002.safetensors' for i in (1, 2)]
  add(tmp_path, shards[0], w=1)
  add(tmp_path, shards[1], v=2)
  index(tmp_path, {'w': shards[0], 'v': shards[1]}, name)
  if other_index:  # without its shards
    index(tmp_path, {'w': 'model-00001-of-00001.safetensors'})
  assert read(tmp_path) == {'w': 1, 'v': 2}


def test_the_plain_files_come_before_variants_even_if_incomplete(tmp_path):
  add(tmp_path, 'model.fp16.safetensors', w=1, v=1)
  add(tmp_path, 'model-1.safetensors', w=2)
  index(tmp_path, {'w': 'model-1.safetensors', 'v': 'model-2.safetensors'})
  with pytest.raises(ModelError, match='model-2.safetensors'):
    read(tmp_path)
  add(tmp_path, 'model-2.safetensors', v=3)
  assert read(tmp_path) == {'w': 2, 'v': 3}


def test_several_variants_are_not_chosen_between(tmp_path):
  add(tmp_path, 'model.fp16.safetensors', w=1)
  add(tmp_path, 'model.bf16.safetensors', w=1)
  with pytest.raises(ModelError, match=r'bf16.*fp16'):
    read(tmp_path)
