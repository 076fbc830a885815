"""A model on disk: exact weights, digests, chained stages, no overwriting."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import files, model_folder, paths, text_folder
from imagen_jax.io.checkpoint import Checkpoints

TEXT = {'dim': 8, 'max_len': 4, 'digest': 'abc'}


def config(name, resolution, low):
  stage = {'name': name, 'resolution': resolution, 'low_resolution': low}
  train = {'checkpoint_dir': None}
  text = {'path': '/nowhere', 'dtype': 'float32'}
  data = {'kind': 'folder'}
  return {'stage': stage, 'text': text, 'train': train, 'data': data}


def params(seed=0):
  generator = np.random.default_rng(seed)
  return {
    'down_0': {
      'blocks': {'kernel': generator.normal(size=(2, 3, 5)).astype('f')},
      # Transposed: not contiguous in memory.
      'bias': generator.normal(size=(3, 2)).astype('f').T,
      'device': jnp.arange(3.0),
    },
    'scale': np.full((), 1.5, np.float32),
  }


def save(path, name, resolution, low=None, seed=0, **options):
  model_folder.save_stage(
    path / name,
    params(seed),
    config=config(name, resolution, low),
    text=TEXT,
    provenance={'command': 'train.py', 'steps': 3},
    **options,
  )


def save_workdir(path, name, resolution, low=None, steps=(1,)):
  workdir = path / name
  workdir.mkdir(parents=True)
  record = {'config': config(name, resolution, low), 'text': TEXT}
  files.write_json(
    workdir / 'config.json',
    {'format_version': model_folder.FORMAT_VERSION, **record},
  )
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    for step in steps:
      state = {'params': params(step), 'ema_params': params(step + 100)}
      checkpoints.save(step, {**state, 'opt_state': [jnp.zeros(3)]})


def assert_equal(tree, expected, rtol=0.0):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)):
    assert isinstance(a, np.ndarray) and a.dtype == np.float32
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=rtol, atol=0)


@pytest.fixture
def model(tmp_path):
  save(tmp_path, 'sr2', 256, 64, seed=2)
  save(tmp_path, 'base', 16, seed=0)
  save(tmp_path, 'sr1', 64, 16, seed=1)
  (tmp_path / 'text').mkdir()
  (tmp_path / 'text' / 'config.json').write_text('{"model_type": "t5"}')
  return tmp_path


def test_float32_weights_come_back_exactly(tmp_path):
  save(tmp_path, 'base', 16, dtype='float32')
  record = model_folder.load_stage(tmp_path / 'base')
  assert_equal(model_folder.load_params(record), params())


def test_bfloat16_weights_come_back_rounded_to_nearest(model):
  record = model_folder.load_stage(model / 'base')
  rounded = jax.tree.map(
    lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32),
    params(),
  )
  loaded = model_folder.load_params(record)
  assert_equal(loaded, rounded)
  assert_equal(loaded, params(), rtol=2**-8)
  size = (model / 'base' / 'weights.safetensors').stat().st_size
  assert size < 40 * 2 + 500


def test_a_stage_record_holds_what_was_saved(model):
  record = model_folder.load_stage(model / 'sr1')
  sides = record.resolution, record.low_resolution
  assert (record.name, sides) == ('sr1', (64, 16))
  assert record.config == config('sr1', 64, 16) and record.text == TEXT
  assert record.provenance == {'command': 'train.py', 'steps': 3}


def test_stages_come_in_the_order_of_the_chain(model):
  (model / 'sr2').rename(model / 'a')  # not the order of the directories
  names = [record.name for record in model_folder.find_stages(model)]
  assert names == ['base', 'sr1', 'sr2']
  alone = model_folder.find_stages(model / 'sr1')
  assert [record.name for record in alone] == ['sr1']
  chosen = model_folder.find_stages(model, ['sr1', 'sr2'])
  assert [record.name for record in chosen] == ['sr1', 'sr2']
  # Lists of settings are in the order of the names, so no other is accepted.
  for names in ['sr3'], ['sr2', 'sr1'], ['sr1', 'sr1'], ['']:
    with pytest.raises(UsageError):
      model_folder.find_stages(model, names)


@pytest.mark.parametrize(
  ('name', 'resolution', 'low', 'other'),
  [
    ('sr3', 1024, 128, 'sr2'),
    ('base2', 32, None, 'base'),
    ('second', 64, 16, 'sr1'),
  ],
)
def test_stages_that_do_not_chain_are_both_named(
  model, name, resolution, low, other
):
  save(model, name, resolution, low)
  with pytest.raises(ModelError) as caught:
    model_folder.find_stages(model)
  assert {name, other} <= set(str(caught.value).split())
  model_folder.find_stages(model, ['base', 'sr1', 'sr2'])


@pytest.mark.parametrize('position', [0, 20, -1])
def test_damaged_weights_are_noticed_and_the_file_named(model, position):
  file = model / 'base' / 'weights.safetensors'
  raw = bytearray(file.read_bytes())
  raw[position] ^= 1
  file.write_bytes(raw)
  record = model_folder.load_stage(model / 'base')
  with pytest.raises(ModelError, match='base/weights.safetensors'):
    model_folder.load_params(record)


def test_half_a_stage_or_no_model_is_named(model, tmp_path):
  (model / 'sr2' / 'weights.safetensors').unlink()
  with pytest.raises(ModelError, match='sr2.*weights.safetensors'):
    model_folder.find_stages(model)
  (model / 'sr1' / 'stage.json').unlink()
  with pytest.raises(ModelError, match='sr1'):
    model_folder.find_stages(model)
  (model / 'another' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(ModelError, match='another'):
    model_folder.find_stages(model)
  with pytest.raises(ModelError, match='missing'):
    model_folder.find_stages(model / 'missing')
  with pytest.raises(ModelError, match='text'):
    model_folder.find_stages(model / 'text')


@pytest.mark.parametrize(
  'value', [None, 3.5, '16', [16], {}], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize(
  'key',
  [
    'config stage name', 'config stage resolution', 'text dim', 'text max_len',
    'text digest', 'weights dtype', 'weights bytes', 'weights sha256', 'text',
    'config', 'config data kind', 'provenance',
  ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(model, key, value):
  file = model / 'base' / 'stage.json'
  record = json.loads(file.read_text())
  *path, last = key.split()
  place = record
  for name in path:
    place = place[name]
  place[last] = [value] if type(place[last]) is type(value) else value
  file.write_text(json.dumps(record))
  with pytest.raises(ModelError, match='base/stage.json'):
    model_folder.find_stages(model)


def test_a_json_that_is_damaged_or_newer_is_refused(model):
  file = model / 'base' / 'stage.json'
  whole = json.loads(file.read_text())
  for text, key in [
    ('{', ''),
    ('[]', ''),
    (json.dumps({**whole, 'format_version': 9}), '9'),
    (json.dumps({**whole, 'text': {}}), 'dim'),
    (json.dumps({**whole, 'config': {}}), 'stage'),
    (json.dumps({**whole, 'weights': None}), ''),
  ]:
    file.write_text(text)
    with pytest.raises(ModelError, match=f'base/stage.json.*{key}'):
      model_folder.load_stage(model / 'base')


def test_nothing_is_overwritten_and_no_half_stage_appears(model, monkeypatch):
  with pytest.raises(UsageError, match='base'):
    save(model, 'base', 16)
  with pytest.raises(UsageError, match='int4'):
    save(model, 'new', 16, dtype='int4')

  def full(*_):
    raise OSError(28, 'No space left on device')

  before = sorted(model.iterdir())
  monkeypatch.setattr(files, 'write_json', full)
  with pytest.raises(ModelError, match='new'):
    save(model, 'new', 16)
  assert sorted(model.iterdir()) == before


def test_what_a_killed_export_left_is_no_stage(model):
  (model / 'sr2').rename(model / '.sr2-x1y2')
  names = [record.name for record in model_folder.find_stages(model)]
  assert names == ['base', 'sr1']


def test_the_digest_changes_with_any_stage_and_the_text_encoder(model):
  def digest(**text):
    found = model_folder.find_stages(model)
    for record in found:
      record.text.update(text)
    return model_folder.model_digest(found)

  first = digest()
  assert len(first) == 16 and first == digest()
  assert digest(digest='other') != first
  (model / 'sr1').rename(model / '.old')
  save(model, 'sr1', 64, 16, seed=7)
  assert digest() != first


def test_a_training_workdir_is_a_stage_with_its_newest_good_ema(model):
  (model / 'sr2').rename(model / '.old')
  save_workdir(model, 'sr2', 256, 64, steps=(1, 2))
  record = model_folder.find_stages(model)[-1]
  assert record.name == 'sr2'
  assert_equal(model_folder.load_params(record), params(102))
  newest = model_folder.model_digest([record])
  state = model / 'sr2' / 'checkpoints' / '2' / 'state' / '_METADATA'
  state.write_bytes(b'')
  again = model_folder.find_stages(model)[-1]
  assert_equal(model_folder.load_params(again), params(101))
  assert model_folder.model_digest([again]) != newest


def test_a_workdir_without_a_checkpoint_is_named_when_it_is_needed(model):
  save_workdir(model, 'sr3', 1024, 256, steps=())
  record = model_folder.find_stages(model)[-1]
  assert record.name == 'sr3'
  with pytest.raises(ModelError, match='sr3/checkpoints'):
    model_folder.load_params(record)


def test_a_text_encoder_beside_the_stages_takes_precedence(model, tmp_path):
  record = model_folder.load_stage(model / 'base')
  assert text_folder.of_stage(model, record) == model / 'text'
  assert text_folder.of_stage(model / 'base', record) == model / 'text'
  (model / 'text').rename(model / 't5')
  with pytest.raises(ModelError, match='base.*text'):
    text_folder.of_stage(model, record)
  record.config['text']['path'] = str(model / 't5')
  assert text_folder.of_stage(model, record) == model / 't5'


def test_a_missing_text_encoder_names_what_makes_it(tmp_path):
  needed = text_folder.existing
  assert needed('demo') == paths.ASSETS / 'demo' / 'text'
  path = tmp_path / 'runs' / 'text'
  with pytest.raises(ModelError, match=f'--config mine --workdir {path}.*demo'):
    needed(path, 'mine')
  with pytest.raises(ModelError, match='google/t5.*demo'):
    needed(path)
  # A pretraining that has not finished is no encoder yet.
  (path / 'checkpoints').mkdir(parents=True)
  (path / 'config.json').write_text('{}')
  with pytest.raises(ModelError, match='--config mine'):
    needed(path, 'mine')
  (path / 'export').mkdir()
  (path / 'export' / 'config.json').write_text('{}')
  assert needed(path, 'mine') == path / 'export'
