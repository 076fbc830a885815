"""Every command ends well; configs are found, and changed only as they can."""

import errno
import os
import subprocess
import sys

import pytest

from imagen_jax import errors
from imagen_jax.cli import configs
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.cli.errors import Parser, run
from imagen_jax.errors import UsageError

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=''):
  return ConfigDict(dict(
    name=arg or 'plain', dtype='auto', seed=0, path=None,
    net=dict(channels=(16, 32), dropout=0.1, wide=False, options=dict()),
    train=dict(num_steps=100, clip=1.0),
  ))
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


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
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
    (OSError(errno.ENOSPC, '', 'out/a.png'), 'disk is full at out/a.png'),
    (OSError(errno.EROFS, '', 'out'), 'out is on a read-only file system'),
    (PermissionError(errno.EACCES, '', 'out'), 'permission is denied at out'),
    (MemoryError(), 'use a smaller batch'),
    (
      type('JaxRuntimeError', (RuntimeError,), {})('RESOURCE_EXHAUSTED: 9 GB'),
      'use a smaller batch',
    ),
  ],
)
def test_a_full_disk_or_memory_is_a_sentence(error, words, capfd):
  assert ends(error) == 2
  assert words in capfd.readouterr().err


def test_a_reader_that_leaves_ends_the_command_quietly():
  code = (
    'from imagen_jax.cli.errors import run; import sys\n'
    'def main(argv):\n'
    '  for i in range(10**6): print(i)\n'
    'sys.exit(run(main, []))'
  )
  command = f'"{sys.executable}" -c "{code}" | head -1'
  out = subprocess.run(command, shell=True, capture_output=True, check=True)
  assert (out.stdout, out.stderr) == (b'0\n', b'')


def test_a_reader_that_has_left_before_is_no_error_either():
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
  parser.add_argument('--steps', type=int, help='how many')
  return parser


def test_help_is_exit_code_0_and_shows_the_flags(capfd):
  assert run(lambda argv: parser().parse_args(argv), ['--help']) == 0
  assert '--steps' in capfd.readouterr().out


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--step', '3'], 'no argument --step; did you mean --steps'),
    (['--prmopt=x'], 'no argument --prmopt; did you mean --prompt'),
    (['--zzz'], 'no argument --zzz. See sample.py --help'),
    (['stray'], 'no argument stray'),
    (['--steps', 'many'], "invalid int value: 'many'"),
    (['--prompt'], 'expected one argument'),
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
    with pytest.raises(UsageError, match='--config.a needs a value'):
      split_overrides(argv)


def test_a_config_is_found_by_name_and_by_path_with_its_argument(here):
  assert load_config('tiny').name == 'plain'
  assert load_config('tiny:blue').name == 'blue'
  assert load_config('configs/tiny.py').name == 'plain'
  assert load_config(f'{here}/configs/tiny.py:a:b').name == 'a:b'


def test_installed_configs_are_found_from_anywhere(here, monkeypatch):
  elsewhere = here / 'installed'
  (here / 'configs').rename(elsewhere)
  monkeypatch.setattr(
    configs, '_directories', lambda: [here / 'none', elsewhere]
  )
  assert load_config('tiny').name == 'plain'
  (here / 'none').mkdir()
  (here / 'none' / 'tiny.py').write_text(CONFIG.replace('plain', 'nearer'))
  assert load_config('tiny').name == 'nearer'


def test_the_checkout_s_configs_are_among_those_searched():
  root = configs.pathlib.Path(configs.__file__).parents[2]
  assert root / 'configs' in configs._directories()


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('tniy', "no config named 'tniy'; .*did you mean tiny"),
    ('configs/tnny.py', 'no config file configs/tnny.py.*did you mean tiny.py'),
    ('configs/broken.py', 'broken.py does not run: NameError.*nowhere'),
    ('configs/empty.py', 'empty.py is no config'),
    ('__init__', 'no config named'),
  ],
)
def test_a_config_that_is_not_there_or_does_not_run(here, name, words):
  (here / 'configs' / '__init__.py').write_text('')
  (here / 'configs' / 'broken.py').write_text('nowhere')
  (here / 'configs' / 'empty.py').write_text('')
  with pytest.raises(UsageError, match=words):
    load_config(name)


@pytest.mark.parametrize(
  ('override', 'key', 'value'),
  [
    ('seed=7', 'seed', 7),
    ('train.num_steps=2_000', 'train.num_steps', 2000),
    ('train.num_steps=2e3', 'train.num_steps', 2000),
    ('train.clip=2', 'train.clip', 2.0),
    ('train.clip=None', 'train.clip', None),
    ('net.wide=true', 'net.wide', True),
    ('net.wide=0', 'net.wide', False),
    ('dtype=bfloat16', 'dtype', 'bfloat16'),
    ('name=7', 'name', '7'),
    ('net.channels=(8,16,32)', 'net.channels', (8, 16, 32)),
    ('net.channels=8,16', 'net.channels', (8, 16)),
    ('net.channels=8', 'net.channels', (8,)),
    ('path=/data/a=b', 'path', '/data/a=b'),
    ('path=3', 'path', 3),
    ('net.options.b2=0.99', 'net.options.b2', 0.99),
    ('net.options.fused=true', 'net.options.fused', True),
    ('net.options.fused=False', 'net.options.fused', False),
  ],
)
def test_a_value_is_read_as_the_type_it_replaces(here, override, key, value):
  config = load_config('tiny', [override])
  for part in key.split('.'):
    config = config[part]
  assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
  ('override', 'words'),
  [
    ('train.num_stpes=3', "'train.num_stpes'; did you mean train.num_steps"),
    ('num_steps=3', 'did you mean train.num_steps'),
    ('clip=3', 'did you mean train.clip'),
    ('trian.num_steps=3', 'did you mean train.num_steps'),
    ('seed.x=3', "no key 'seed.x'"),
    ('train=3', 'is a section; set one of its keys: train.clip, tr'),
    ('train.num_steps=many', "cannot be 'many': it is a whole number.*100"),
    ('train.num_steps=1.5', 'a whole number'),
    ('train.num_steps=inf', 'a whole number'),
    ('train.clip=x', 'it is a number'),
    ('net.wide=maybe', 'true or false'),
    ('net.channels=a,b', 'whole number'),
    ('seed', 'write key=value'),
  ],
)
def test_a_change_that_cannot_be_made_says_why(here, override, words):
  with pytest.raises(UsageError, match=words):
    load_config('tiny', [override])


def test_a_loaded_config_is_locked(here):
  config = load_config('tiny', ['net.options.a=1', 'net.options.b=2'])
  assert config.net.options.to_dict() == {'a': 1, 'b': 2}
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
