"""The defaults are complete, commented and the only ones."""

import ast
import dataclasses
import importlib
import pathlib

import pytest
from imagen_jax.configs import common

from imagen_jax import configs
from imagen_jax.cascade import stage_config
from imagen_jax.cli.config_values import complete
from imagen_jax.cli.configs import load_config
from imagen_jax.data import sources
from imagen_jax.errors import UsageError
from imagen_jax.training.workdir import FREE

FOLDER = pathlib.Path(configs.__path__[0])
NAMES = sorted(
  path.stem
  for path in FOLDER.glob('*.py')
  if path.stem not in ('__init__', 'common')
)


def keys(config, section=''):
  """The keys of a config, without those inside open sections."""
  for key, value in config.items():
    name = f'{section}{key}'
    yield name
    if hasattr(value, 'items') and name not in common.OPEN:
      yield from keys(value, f'{name}.')


@pytest.mark.parametrize('name', NAMES)
def test_a_config_has_every_key_of_its_kind_and_no_other(name):
  config = load_config(name)
  assert set(keys(config)) == set(keys(common.template(config.kind)))
  # The file itself sets all of them: `complete` adds nothing.
  own = importlib.import_module(f'imagen_jax.configs.{name}').get_config()
  assert config.to_dict() == own.to_dict()


@pytest.mark.parametrize('name', NAMES)
def test_a_config_builds_on_common_or_on_its_own_family(name):
  tree = ast.parse((FOLDER / f'{name}.py').read_text(encoding='utf-8'))
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module == 'imagen_jax.configs':
      for alias in node.names:
        shared = alias.name in ('common', *common.TEMPLATES.values())
        assert shared or alias.name.split('_')[0] == name.split('_')[0]


def test_every_key_has_a_comment():
  text = (FOLDER / 'common.py').read_text(encoding='utf-8')
  lines = text.splitlines()
  for function in ast.parse(text).body:
    if isinstance(function, ast.FunctionDef):
      for node in ast.walk(function):
        if isinstance(node, ast.Dict):
          for key, value in zip(node.keys, node.values):
            section = isinstance(value, ast.Call) and not value.args
            inner = node.lineno == key.lineno
            before = lines[key.lineno - 2].strip()
            assert section or inner or before.startswith('#'), key.value


def test_a_stage_has_the_fields_that_the_defaults_describe():
  config = common.stage_run().stage.to_dict()
  made = stage_config.from_config(config, text_dim=8, text_len=4)
  built = {'net', 'logsnr_fn', 'text_dim', 'text_len', 'schedule'}
  fields = {field.name for field in dataclasses.fields(made)}
  assert fields - built == config.keys() - built
  sampling = dataclasses.asdict(made.sampling)
  assert sampling == config['sampling']


@pytest.mark.parametrize(
  'key', ['stage.net.chanels', 'stage.schedule.logsnr_mni', 'stage.net.kind']
)
def test_a_key_of_an_open_section_is_checked_where_it_is_used(key):
  config = load_config('shapes_base', [f'{key}=3']).stage.to_dict()
  with pytest.raises(UsageError) as error:
    stage_config.from_config(config, text_dim=8, text_len=4)
  assert key.rpartition('.')[2] in str(error.value)


def test_the_empty_config_is_the_papers_kind_of_stage():
  config = complete({}, file='mine.py')
  assert config.to_dict() == common.stage_run().to_dict()
  assert config.stage.prediction == 'eps' and config.stage.cond_drop == 0.1
  assert config.stage.schedule.kind == 'cosine'
  assert config.train.optimizer.learning_rate == 1e-4


def test_what_a_source_may_ignore_is_the_default():
  data = complete({}, file='mine.py').data
  for key, values in sources.IGNORABLE.items():
    assert data[key] in values


def test_what_a_resumed_run_may_change_are_keys_of_a_config():
  assert set(FREE) <= set(keys(common.stage_run()))
