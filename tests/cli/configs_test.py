"""Exit codes and errors of commands; finding configs and overriding keys."""

import errno
import os
import subprocess
import sys

import pytest
from imagen_jax.configs import common

from imagen_jax import errors
from imagen_jax.cli import configs
from imagen_jax.cli.config_values import TYPES, _flat, complete
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.cli.errors import Parser, positive, run
from imagen_jax.data.sources import make_source
from imagen_jax.errors import UsageError

CONFIG = """
def get_config(arg=''):
  return dict(
    dtype=arg or 'float32',
    stage=dict(
      name='tiny',
      resolution=32,
      net=dict(kind='unet', channel_mults=(1, 2), dropout=0.1),
    ),
    train=dict(num_steps=100),
  )
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'tiny.py').write_text(CONFIG)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def ends(error):
  def main(argv):
    raise error

  return run(main, [])


@pytest.mark.parametrize(
  ('kind', 'code'),
  [
    (errors.UsageError, 2),
    (errors.DataError, 3),
    (errors.ModelError, 4),
    (errors.NumericError, 5),
  ],
)
def test_a_user_s_mistake_is_one_line_and_its_exit_code(kind, code, capfd):
  assert ends(kind('this\nwent wrong.')) == code
  assert capfd.readouterr() == ('', 'error: this went wrong.\n')


def test_the_result_of_main_is_the_exit_code():
  assert run(lambda argv: None, []) == 0
  assert run(lambda argv: 143, []) == 143
  assert run(lambda argv: argv.index('b'), ['a', 'b']) == 1


def test_an_interrupt_is_130(capfd):
  assert ends(KeyboardInterrupt()) == 130
  assert capfd.readouterr().err == 'interrupted\n'


def test_a_bug_keeps_its_traceback(monkeypatch):
  with pytest.raises(ZeroDivisionError):
    ends(ZeroDivisionError())
  with pytest.raises(FileNotFoundError):
    ends(FileNotFoundError(errno.ENOENT, 'gone', 'x'))
  monkeypatch.setenv('IMAGEN_DEBUG', '1')
  with pytest.raises(UsageError):
    ends(UsageError('shown whole'))


@pytest.mark.parametrize(
  ('error', 'words'),
  [
    (OSError(errno.ENOSPC, '', 'out/a.png'), 'out/a.png'),
    (OSError(errno.EROFS, '', 'out'), 'out'),
    (PermissionError(errno.EACCES, '', 'out'), 'out'),
    (MemoryError(), '--batch_size'),
    (
      type('JaxRuntimeError', (RuntimeError,), {})('RESOURCE_EXHAUSTED: 9 GB'),
      '--batch_size',
    ),
  ],
)
def test_a_full_disk_or_memory_is_a_sentence(error, words, capfd):
  assert ends(error) == 2
  assert words in capfd.readouterr().err


@pytest.mark.parametrize(('status', 'code'), [(403, 2), (429, 1)])
def test_a_bucket_that_may_answer_later_is_no_mistake(status, code, capfd):
  kind = type('HttpError', (Exception,), {'__module__': 'gcsfs.retry'})
  error = kind('no')
  error.code = status
  assert ends(error) == code
  assert 'bucket' in capfd.readouterr().err


def test_a_pipe_that_closes_ends_the_command_quietly():
  code = (
    'from imagen_jax.cli.errors import run; import sys\n'
    'def main(argv):\n'
    '  for i in range(10**6): print(i)\n'
    'sys.exit(run(main, []))'
  )
  command = f'"{sys.executable}" -c "{code}" | head -1'
  out = subprocess.run(command, shell=True, capture_output=True, check=True)
  assert (out.stdout, out.stderr) == (b'0\n', b'')


def test_a_pipe_that_was_closed_before_is_no_error_either():
  code = (
    'from imagen_jax.cli.errors import run; import sys; '
    'sys.exit(run(lambda argv: print("x"), []))'
  )
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, '-c', code]
  buffered = {**os.environ, 'PYTHONUNBUFFERED': ''}
  out = subprocess.run(
    command, stdout=write, stderr=subprocess.PIPE, env=buffered
  )
  os.close(write)
  assert (out.returncode, out.stderr) == (1, b'')


def parser():
  parser = Parser(prog='sample.py')
  parser.add_argument('--prompt')
  parser.add_argument('--steps', type=int, default=7, help='how many')
  parser.add_argument('--num', type=positive, help='of images')
  return parser


def test_help_shows_the_flags_and_the_defaults_that_there_are(capfd):
  assert run(lambda argv: parser().parse_args(argv), ['--help']) == 0
  out = capfd.readouterr().out
  assert '--steps' in out and '(default: 7)' in out and 'None' not in out


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--step', '3'], '--steps'),
    (['--prmopt=x'], '--prompt'),
    (['--zzz'], '--zzz'),
    (['stray'], 'stray'),
    (['--steps', 'many'], 'many'),
    (['--num', '0'], '--num'),
    (['--num', '1.5'], '--num'),
    (['--prompt'], '--prompt'),
  ],
)
def test_a_wrong_flag_is_a_usage_error_naming_the_nearest(argv, words, capfd):
  assert run(lambda argv: parser().parse_args(argv), argv) == 2
  err = capfd.readouterr().err
  assert words in err and err.count('\n') == 1


def test_overrides_are_taken_out_of_the_arguments_in_both_forms():
  argv = '--config tiny --config.a.b=1=2 --workdir w --config.c -3 x'.split()
  assert split_overrides(argv) == (
    ['--config', 'tiny', '--workdir', 'w', 'x'],
    ['a.b=1=2', 'c=-3'],
  )
  for argv in (['--config.a'], ['--config.a', '--workdir']):
    with pytest.raises(UsageError):
      split_overrides(argv)


def test_a_config_is_found_by_name_and_by_path_with_its_argument(here):
  assert load_config('tiny').dtype == 'float32'
  assert load_config('tiny:blue').dtype == 'blue'
  assert load_config('configs/tiny.py').dtype == 'float32'
  assert load_config(f'{here}/configs/tiny.py:a:b').dtype == 'a:b'


def test_the_current_directory_comes_before_the_installed_configs(here):
  assert load_config('shapes_base').stage.resolution == 16
  (here / 'configs' / 'shapes_base.py').write_text(CONFIG)
  assert load_config('shapes_base').stage.resolution == 32


def test_configs_load_in_a_checkout_that_is_not_installed(tmp_path):
  root = configs.pathlib.Path(configs.__file__).parents[2]
  for name in ('configs', 'imagen_jax'):
    (tmp_path / name).symlink_to(root / name)
  code = (
    'import sys\n'
    'sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f)]\n'
    'from imagen_jax.cli.configs import load_config\n'
    'print(load_config("emoji_sr256").stage.low_resolution)'
  )
  command = [sys.executable, '-c', code]
  out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert out.stdout == '64\n', out.stderr


@pytest.mark.parametrize(
  ('name', 'near'),
  [
    ('tniy', 'tiny'),
    ('configs/tnny.py', 'tiny.py'),
    ('configs/broken.py', 'NameError'),
    ('configs/empty.py', 'get_config'),
    ('configs/number.py', '7'),
    ('configs/ill_typed.py', 'num_steps'),
    ('__init__', '__init__'),
    ('common', 'common'),
  ],
)
def test_a_config_that_is_missing_or_does_not_run_is_refused(here, name, near):
  for stem, text in {
    '__init__': '',
    'broken': 'nowhere',
    'empty': '',
    'number': 'def get_config():\n  return 7\n',
    'ill_typed': 'from imagen_jax.configs import common\n'
    'def get_config():\n'
    '  config = common.stage_run()\n'
    '  config.train.num_steps = "many"\n'
    '  return config\n',
  }.items():
    (here / 'configs' / f'{stem}.py').write_text(text)
  with pytest.raises(UsageError) as error:
    load_config(name)
  assert near in str(error.value)


def test_an_unknown_name_lists_the_configs_and_not_what_they_share(here):
  with pytest.raises(UsageError) as error:
    load_config('nothing')
  assert 'tiny' in str(error.value) and 'common' not in str(error.value)


def test_a_key_that_a_file_leaves_out_has_its_default(here):
  config = load_config('tiny')
  assert (config.kind, config.train.batch_size) == ('stage', 64)
  assert config.stage.net.to_dict() == {
    'kind': 'unet',
    'channel_mults': (1, 2),
    'dropout': 0.1,
  }


@pytest.mark.parametrize(
  ('given', 'key', 'near'),
  [
    ({'train': {'num_stpes': 3}}, 'train.num_stpes', 'train.num_steps'),
    ({'stage': {'num_steps': 3}}, 'stage.num_steps', 'train.num_steps'),
    ({'stage': {'sampling': {'step': 3}}}, 'stage.sampling.step', 'steps'),
    ({'data': {'flips': True}}, 'data.flips', 'data.flip'),
    ({'sead': 1}, 'sead', 'seed'),
    ({'kind': 'if_finetune', 'rang': 1}, 'rang', 'rank'),
    ({'kind': 'm:Mine', 'train': {'num_stpes': 3}}, 'num_stpes', 'num_steps'),
  ],
)
def test_an_unknown_key_is_named_with_the_nearest(given, key, near):
  with pytest.raises(UsageError) as error:
    complete(given, file='mine.py')
  for data in ('mine.py', key, near):
    assert data in str(error.value)


@pytest.mark.parametrize(
  ('given', 'key', 'expected'),
  [
    ({'train': {'num_steps': 1.5}}, 'train.num_steps', int),
    ({'train': {'num_steps': True}}, 'train.num_steps', int),
    ({'train': {'ema_decay': 'no'}}, 'train.ema_decay', float),
    ({'data': {'flip': 1}}, 'data.flip', bool),
    ({'data': {'path': 3}}, 'data.path', str),
    ({'stage': {'crop': '96'}}, 'stage.crop', int),
    ({'train': 3}, 'train', None),
    ({'data': 3}, 'data', None),
    ({'seed': {'a': 1}}, 'seed', int),
    ({'data': {'mixture': {'a': {'path': 3}}}}, 'data.mixture.a.path', str),
    ({'data': {'mixture': {'a.b': {'path': 'c'}}}}, 'a.b', None),
  ],
)
def test_a_value_of_another_type_names_the_expected_one(given, key, expected):
  with pytest.raises(UsageError) as error:
    complete(given, file='mine.py')
  for data in ('mine.py', key, TYPES.get(expected, '')):
    assert data in str(error.value)


def test_values_of_a_file_are_kept_or_become_their_keys_type():
  given = {
    'train': {'ema_decay': 1, 'sample_every': None, 'keep_every': 10},
    'stage': {'sampling': {'guidance_interval': [-3.0, 3.0]}},
    'data': {'mixture': {'pair': 1.0}},
  }
  config = complete(given, file='mine.py')
  assert type(config.train.ema_decay) is float
  assert (config.train.sample_every, config.train.keep_every) == (None, 10)
  assert config.stage.sampling.guidance_interval == (-3.0, 3.0)
  assert config.data.mixture.to_dict() == {'pair': 1.0}


def test_none_clears_a_section_whose_default_is_none():
  assert load_config('shapes_base', ['data.mixture=None']).data.mixture is None
  with pytest.raises(UsageError):
    load_config('shapes_base', ['train.optimizer=None'])


def test_another_data_kind_names_the_mixture_to_clear(tmp_path):
  changes = ['data.kind=folder', f'data.path={tmp_path}']
  data = load_config('shapes_base', changes).data.to_dict()
  data = {k: data[k] for k in ('kind', 'path', 'mixture')}
  with pytest.raises(UsageError) as error:
    make_source(**data, size=8)
  assert error.value.key == 'config.data.mixture'


def test_a_class_of_the_users_own_brings_keys_of_its_own(here):
  with pytest.raises(UsageError):
    load_config('tiny', ['data.colour=red'])
  changes = ['data.colour=red', 'data.kind=mine:Source']
  assert load_config('tiny', changes).data.colour == 'red'
  config = load_config('tiny', ['kind=mine:Experiment', 'depth=3'])
  assert config.depth == 3 and config.stage.prediction == 'eps'
  config = complete({'kind': 'mine:Experiment', 'depth': 3}, file='mine.py')
  assert 'stage' not in config and config.train.batch_size == 64


@pytest.mark.parametrize(
  ('override', 'key', 'value'),
  [
    ('seed=7', 'seed', 7),
    ('train.num_steps=2_000', 'train.num_steps', 2000),
    ('train.num_steps=2e3', 'train.num_steps', 2000),
    ('train.optimizer.clip=2', 'train.optimizer.clip', 2.0),
    ('train.optimizer.clip=None', 'train.optimizer.clip', None),
    ('data.flip=true', 'data.flip', True),
    ('data.flip=0', 'data.flip', False),
    ('dtype=bfloat16', 'dtype', 'bfloat16'),
    ('stage.name=7', 'stage.name', '7'),
    ('stage.crop=16', 'stage.crop', 16),
    ('stage.contrast_floor=1', 'stage.contrast_floor', 1.0),
    ('data.path=/data/a=b', 'data.path', '/data/a=b'),
    ('data.path=3', 'data.path', '3'),
    ('stage.net.channel_mults=(1,2,3)', 'stage.net.channel_mults', (1, 2, 3)),
    ('stage.net.channel_mults=1,2', 'stage.net.channel_mults', (1, 2)),
    ('stage.net.channel_mults=1', 'stage.net.channel_mults', (1,)),
    ('stage.net.remat=None', 'stage.net.remat', None),
    ('stage.net.kind=mine:Net', 'stage.net.kind', 'mine:Net'),
    ('train.optimizer.options.b2=0.9', 'train.optimizer.options.b2', 0.9),
    ('train.optimizer.options.b=true', 'train.optimizer.options.b', True),
  ],
)
def test_an_override_is_read_as_the_type_of_its_key(here, override, key, value):
  config = load_config('tiny', [override])
  for part in key.split('.'):
    config = config[part]
  assert config == value and type(config) is type(value)


def test_an_interval_is_a_tuple_on_the_command_line(here):
  key = 'stage.sampling.guidance_interval'
  config = load_config('tiny', [f'{key}=(-3,3)'])
  assert config.stage.sampling.guidance_interval == (-3, 3)
  with pytest.raises(UsageError) as error:
    load_config('tiny', [f'{key}=3'])
  assert error.value.key == f'config.{key}'


@pytest.mark.parametrize(
  ('override', 'near'),
  [
    ('train.num_stpes=3', 'train.num_steps'),
    ('num_steps=3', 'train.num_steps'),
    ('clip=3', 'train.optimizer.clip'),
    ('trian.num_steps=3', 'train.num_steps'),
    ('seed.x=3', 'seed'),
    ('train=3', 'train.num_steps'),
    ('train.num_steps=many', TYPES[int]),
    ('train.num_steps=1.5', TYPES[int]),
    ('train.num_steps=inf', TYPES[int]),
    ('train.optimizer.clip=x', TYPES[float]),
    ('data.flip=maybe', TYPES[bool]),
  ],
)
def test_a_change_that_cannot_be_made_names_the_key_or_type(
  here, override, near
):
  with pytest.raises(UsageError) as error:
    load_config('tiny', [override])
  assert error.value.key == f'config.{override.partition("=")[0]}'
  assert near in str(error.value)


@pytest.mark.parametrize(
  'override',
  [
    'train.num_steps=-5',
    'train.num_steps=2147483648',
    'train.log_every=0',
    'train.keep_last=0',
    'train.ema_decay=1.001',
    'train.ema_decay=-0.1',
    'train.ema_lengths=(0.05,0.5)',
    'train.ema_lengths=("a",)',
    'train.hang_seconds=inf',
    'train.optimizer.learning_rate=nan',
    'train.optimizer.clip=0',
    'train.optimizer.warmup=-1',
    'train.optimizer.options.b2=1e999',
    'stage.resolution=0',
    'stage.low_resolution=-8',
    'stage.crop=0',
    'stage.cond_drop=2',
    'stage.sampling.guidance=nan',
    'stage.sampling.steps=0',
    'stage.sampling.guidance_interval=(-3,1e999)',
    'stage.sigmoid_bias=-inf',
    'stage.net.channel_mults=(1,1e999)',
    'stage.net.dropout=nan',
    'stage.net.dropout=-0.5',
    'stage.net.dropout=high',
    'stage.net.channels=inf',
    'stage.schedule.logsnr_min=x',
    'stage.schedule.logsnr_max=None',
    'stage.schedule.beta_start=-1',
    'stage.schedule.shift_from=0',
    'train.optimizer.options.b1=2',
    'train.optimizer.options.b2=abc',
    'text.max_len=0',
    'data.max_bad=1.5',
    'data.workers=-1',
    'mesh.data=99999999999999999999',
    'seed=-1',
    'seed=4294967296',
    'data.seed=99999999999999999999',
    # Without a meaning for None:
    'seed=None',
    'train.num_steps=None',
    'train.ema_decay=none',
    'train.optimizer.learning_rate=None',
    'data.flip=None',
    'stage.resolution=None',
  ],
)
def test_a_value_without_sense_is_refused_by_its_key(here, override):
  with pytest.raises(UsageError) as error:
    load_config('tiny', [override])
  assert error.value.key == f'config.{override.partition("=")[0]}'


def test_the_ends_of_a_range_belong_to_it_where_they_make_sense(here):
  changes = ['seed=4294967295', 'stage.cond_drop=0', 'train.ema_decay=1']
  changes += ['stage.sampling.percentile=100', 'train.num_steps=2147483647']
  config = load_config('tiny', changes)
  assert config.seed == 2**32 - 1 and config.stage.cond_drop == 0.0


@pytest.mark.parametrize(
  'given',
  [
    {'train': {'num_steps': -5}},
    {'train': {'ema_decay': 2}},
    {'data': {'mixture': {'a': {'max_bad': 1.5}}}},
    {'train': {'batch_size': None}},
    {'train': {'optimizer': {'learning_rate': float('nan')}}},
    {'stage': {'net': {'kind': 'unet', 'dropout': float('nan')}}},
    {'kind': 'if_finetune', 'rank': 0},
    {'kind': 'text', 'tasks': {'span_density': 1.0}},
  ],
)
def test_a_value_without_sense_is_refused_by_its_file(given):
  with pytest.raises(UsageError, match='mine.py') as error:
    complete(given, file='mine.py')
  assert error.value.key is None


def test_each_range_is_of_a_key_and_holds_its_default():
  kinds = 'stage', *common.TEMPLATES
  defaults = {k: v for n in kinds for k, v in _flat(common.template(n)).items()}
  listed = {*common.RANGES, *common.NULLABLE}
  listed = {key for key in listed if not key.startswith(common.OPEN)}
  assert defaults.keys() >= listed
  for kind in kinds:
    complete({'kind': kind}, file='mine.py')


def test_a_string_stays_one_whatever_the_file_had():
  given = {'data': {'eval_path': None, 'path': None, 'kind': 'mine:Source'}}
  given['data']['tag'] = 'a'
  for key in ('eval_path', 'path', 'tag'):
    for text in ('2024_01', '007', '1e3', 'true', '(1,2)'):
      config = complete(given, [f'data.{key}={text}'], file='mine.py')
      assert config.data[key] == text
  assert complete(given, ['data.path=None'], file='mine.py').data.path is None
  given = {'stage': {'crop': None}}
  with pytest.raises(UsageError):
    complete(given, ['stage.crop=wide'], file='mine.py')


def test_a_key_that_is_no_string_is_refused():
  with pytest.raises(UsageError):
    complete({3: 4}, file='mine.py')


def test_an_override_needs_a_value(here):
  with pytest.raises(UsageError):
    load_config('tiny', ['seed'])


def test_a_loaded_config_is_locked(here):
  options = 'train.optimizer.options'
  config = load_config('tiny', [f'{options}.a=1', f'{options}.b=2'])
  assert config.train.optimizer.options.to_dict() == {'a': 1, 'b': 2}
  with pytest.raises((KeyError, AttributeError)):
    config.train.num_stpes = 3


def test_parsing_a_command_line_imports_no_jax():
  code = (
    'import sys; from imagen_jax.cli import configs, errors; '
    'errors.Parser(); print("jax" in sys.modules)'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, check=True
  )
  assert out.stdout == b'False\n'


def test_the_bundled_configs_name_a_config_that_exists():
  for name in ('shapes_base', 'shapes_sr1', 'emoji_base', 'emoji_sr256'):
    text = load_config(name).text
    trained = load_config(text.trained_by)
    assert trained.kind == 'text' and trained.train.num_steps > 0
