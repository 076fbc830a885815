"""Stages in a given time: with a stub of train.py, and for real."""

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from imagen_jax.errors import UsageError

PATH = pathlib.Path(__file__).parents[2] / 'scripts' / 'train_within.py'
# Writes when it has begun and ended, what it was told, and a metric.
TRAIN = """
import json, pathlib, signal, sys, time
config = sys.argv[sys.argv.index('--config') + 1]
folder = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1])
note = lambda name, value: (folder / name).write_text(json.dumps(value))
def stop(number, frame):
  note('end', time.monotonic())
  sys.exit(130)
signal.signal(signal.SIGINT, stop)
note('words', sys.argv[1:])
note('begin', time.monotonic())
if config == 'broken':
  sys.exit('error: it is broken.')
row = {'step': 7, 'loss': 0.25, 'images_per_sec': 80.0, 'mfu_percent': 31.5}
(folder / 'metrics.jsonl').write_text(json.dumps(row) + '\\n')
time.sleep(0 if config == 'short' else 60)
note('end', time.monotonic())
"""
EXPORT = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1])
if not (folder / 'end').exists():
  sys.exit('error: nothing is saved.')
out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])
out.mkdir(parents=True)
(out / 'weights').write_bytes(bytes(2**20))
"""


@pytest.fixture
def script(monkeypatch, tmp_path):
  """The script, with stubs in place of training and export."""
  spec = importlib.util.spec_from_file_location('train_within', PATH)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, 'train_within', module)
  spec.loader.exec_module(module)
  for name, text in (('TRAIN', TRAIN), ('EXPORT', EXPORT)):
    path = tmp_path / f'{name}.py'
    path.write_text(text)
    monkeypatch.setattr(module, name, (str(path),))
  monkeypatch.setattr(module, 'EXPORTING', 1.0)
  return module


def read(tmp_path, stage, name):
  return json.loads((tmp_path / 'runs' / stage / name).read_text())


def train(script, tmp_path, *words, seconds=5.0, lead=0.6):
  return script.main(
    [
      f'--minutes={seconds / 60}',
      f'--lead={lead}',
      f'--workdir={tmp_path / "runs"}',
      f'--out={tmp_path / "out"}',
      *words,
    ]
  )


def test_each_stage_has_its_share(script, tmp_path, capfd):
  words = ['--', '--config.seed=3', '--sr1.config.train.batch_size=8']
  assert train(script, tmp_path, 'base=a:2', 'sr1=b', *words) == 0
  begin, end = (
    {name: read(tmp_path, name, at) for name in ('base', 'sr1')}
    for at in ('begin', 'end')
  )
  assert end['base'] - begin['base'] == pytest.approx(2.7, abs=0.8)
  assert end['sr1'] - end['base'] == pytest.approx(1.3, abs=0.8)
  # The second starts while the first still trains.
  assert 0.1 < end['base'] - begin['sr1'] < 1
  assert '--config.seed=3' in read(tmp_path, 'base', 'words')
  assert '--config.train.batch_size=8' not in read(tmp_path, 'base', 'words')
  assert read(tmp_path, 'sr1', 'words')[-4:-2] == [
    '--config.seed=3',
    '--config.train.batch_size=8',
  ]
  printed = capfd.readouterr().out
  line = 'step 7, loss 0.2500, 80 images/s, MFU 31.5 %, 1.0 MiB'
  assert f'base: {line}\nsr1: {line}\n' in printed


def test_a_stage_that_ends_early_leaves_its_time(script, tmp_path):
  words = ['base=short', 'sr1=b']
  assert train(script, tmp_path, *words, lead=0) == 0
  begin, end = (read(tmp_path, 'sr1', at) for at in ('begin', 'end'))
  assert end - begin > 2.2  # of 4 seconds


def test_a_stage_that_fails_does_not_cost_the_others(script, tmp_path, capfd):
  assert train(script, tmp_path, 'base=broken', 'sr1=b', lead=0) == 1
  assert read(tmp_path, 'sr1', 'end') - read(tmp_path, 'sr1', 'begin') > 2
  printed = capfd.readouterr().out
  assert 'base: no weights (error: it is broken.' in printed
  assert 'sr1: step 7' in printed


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves(script, tmp_path, number):
  """Ctrl-C and a job's end stop the training, which saves its step."""
  loader = (
    'import importlib.util, sys; from imagen_jax.cli import errors; '
    f"s = importlib.util.spec_from_file_location('w', {str(PATH)!r}); "
    "m = sys.modules['w'] = importlib.util.module_from_spec(s); "
    f's.loader.exec_module(m); m.TRAIN = {script.TRAIN!r}; '
    'sys.exit(errors.run(m.main))'
  )
  begin = tmp_path / 'runs' / 'base' / 'begin'
  words = ['--minutes=1', f'--workdir={tmp_path / "runs"}', 'base=a']
  process = subprocess.Popen(
    [sys.executable, '-c', loader, f'--out={tmp_path / "out"}', *words]
  )
  while not begin.exists() or not begin.read_text():
    assert process.poll() is None
    time.sleep(0.05)
  time.sleep(0.2)
  process.send_signal(number)
  assert process.wait(timeout=30) == 128 + number
  assert read(tmp_path, 'base', 'end')


@pytest.mark.parametrize(
  'text', ['base', 'base=', '=a', 'base=a:0', 'base=a:x']
)
def test_a_stage_is_refused(script, text):
  with pytest.raises(argparse.ArgumentTypeError, match='such as base=icons_ba'):
    script.parse_stage(text)


@pytest.mark.parametrize(
  'words, message',
  [
    (['base=a', 'base=b'], 'two stages have one name'),
    (['base=a', '--', '--sr1.config.seed=3'], 'sr1.config.seed=3 is neither'),
    (['base=a', '--', '--config.seed'], 'config.seed is neither'),
  ],
)
def test_arguments_are_refused(script, tmp_path, words, message):
  with pytest.raises(UsageError, match=message):
    train(script, tmp_path, *words)


def test_weights_are_not_replaced(script, tmp_path):
  (tmp_path / 'out' / 'sr1').mkdir(parents=True)
  with pytest.raises(UsageError, match='sr1 exists'):
    train(script, tmp_path, 'base=a', 'sr1=b')


def test_times_are_refused(script, tmp_path):
  with pytest.raises(UsageError, match='minutes are not enough'):
    train(script, tmp_path, 'base=a', seconds=0.5)
  with pytest.raises(UsageError, match='-1.0 is not a number of seconds'):
    train(script, tmp_path, 'base=a', lead=-1)


CONFIG = """
from tests import tiny_model

def get_config():
  config = tiny_model.config({name!r}, num_steps=10**6)
  config.mesh.data = 1
  config.text.path = 'demo'
  config.text.max_len = 64
  return config
"""


@pytest.mark.slow
def test_two_real_stages(tmp_path):
  """Trained, exported, and resumed by the same command."""
  stages = ['base', 'sr1']
  for name in stages:
    (tmp_path / f'{name}.py').write_text(CONFIG.format(name=name))
  command = [
    *(sys.executable, str(PATH), '--minutes=1.25', '--lead=15'),
    *(f'--workdir={tmp_path / "runs"}',),
    *(f'{name}={tmp_path / name}.py' for name in stages),
  ]
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(PATH.parents[1]),
  }
  for out in (tmp_path / 'first', tmp_path / 'second'):
    done = subprocess.run(
      [*command, f'--out={out}'], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(' MiB') == 2
    for name in stages:
      assert (out / name / 'stage.json').exists()
  log = (tmp_path / 'runs' / 'base' / 'log.txt').read_text()
  assert 'resumes after step' in log
