"""Monitoring: the report, the metrics, the loggers, the watchdog."""

import json
import re
import sys
import time
import types

import jax
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.cascade import stage as stages
from imagen_jax.cascade import stage_config
from imagen_jax.cli import runtime
from imagen_jax.cli import train as cli
from imagen_jax.cli.configs import load_config
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.training import chips, loop, report, workdir
from imagen_jax.training.ledger import Ledger
from imagen_jax.training.loggers import find_loggers
from imagen_jax.training.metrics import Metrics
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.profiling import Profiler
from imagen_jax.training.state import init_state
from imagen_jax.training.watchdog import Watchdog
from tests import tiny_model


class FakeWriter:
  """A fake of tensorboardX's and wandb's writers, which are extras."""

  made = []

  def __init__(self, *args, **options):
    self.options, self.calls = options, []
    self.made.append(self)

  def __getattr__(self, name):
    return lambda *args, **options: self.calls.append((name, args))


@pytest.fixture
def config(model):
  config = tiny_model.config(log_every=2)
  config.text.path = str(model / 'text')
  return config


@pytest.fixture(scope='module')
def watched(model, tmp_path_factory):
  """(config, workdir, printed lines, logger) of a run with all monitoring."""
  config = tiny_model.config(log_every=2)
  config.text.path = str(model / 'text')
  config.train.update(eval_every=3, log_to='tensorboard', sample_every=3)
  folder = tmp_path_factory.mktemp('watched') / 'base'
  with pytest.MonkeyPatch.context() as patch:
    module = types.SimpleNamespace(SummaryWriter=FakeWriter)
    patch.setitem(sys.modules, 'tensorboardX', module)
    lines = []
    patch.setattr('builtins.print', lambda *a, **_: lines.append(' '.join(a)))
    patch.setattr(chips, 'find_peak', lambda kind: 1e12)
    loop.train(config, folder)
  return config, folder, lines, FakeWriter.made[-1]


def rows(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return {row['step']: row for row in map(json.loads, lines)}


def test_metrics_have_noise_bands_norms_speed_and_the_heldout_loss(watched):
  found = rows(watched[1])
  assert list(found) == [2, 3, 4, 6]
  row = found[3]
  bands = [row[key] for key in row if key.startswith('loss_t')]
  assert len(bands) == 4
  assert min(bands) <= row['loss'] <= max(bands)
  assert row['heldout_loss'] != row['heldout_loss_ema']
  assert row['param_norm'] > 0 and row['bad_samples'] == 0
  assert 0 <= row['data_wait_percent'] <= 100
  each = row['images_per_sec'] / 2
  assert row['images_per_sec_per_device'] == pytest.approx(each, rel=0.01)
  # At a peak of 1 TFLOP/s the MFU in percent is 100 times the TFLOP/s.
  fraction = 100 * row['tflops_per_device']
  assert row['mfu_percent'] == pytest.approx(fraction, abs=0.01)


class FakeClock:
  """A clock that a test moves."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    for name in ('time', 'perf_counter'):
      monkeypatch.setattr(time, name, lambda: self.now)

  def pass_seconds(self, seconds):
    self.now += seconds


@pytest.fixture
def clock(monkeypatch):
  return FakeClock(monkeypatch)


@pytest.fixture
def metrics(tmp_path, clock):
  """(Metrics of a run of 9 steps, its ledger, the clock)."""
  ledger = Ledger()
  ledger.enter('step')
  path = tmp_path / 'metrics.jsonl'
  return Metrics(path, ledger, start_step=0, num_steps=9), ledger, clock


def test_the_loss_is_the_mean_over_its_bands(metrics, tmp_path):
  metrics, ledger, clock = metrics
  count = np.asarray([1.0, 2, 0, 5])
  step = dict(loss=2.0, grad_norm=1.0, param_norm=3.0, skipped=0)
  step |= dict(band_loss=count * [1, 2, 0, 2.2], band_count=count)
  clock.pass_seconds(1)
  ledger.move(0.25, 'step', 'data_wait')
  metrics.log(1, 8, [step, step | {'loss': np.nan}], [])
  row = rows(tmp_path)[1]
  assert row['loss'] == 2.0  # the step with NaN is left out
  assert [row[f'loss_t{b}'] for b in ('0-0.25', '0.25-0.5', '0.75-1')] == [
    1,
    2,
    2.2,
  ]
  assert 'loss_t0.5-0.75' not in row
  assert (row['images_per_sec'], row['data_wait_percent']) == (8.0, 25.0)
  assert (row['goodput_percent'], row['seconds_data_wait']) == (75.0, 0.25)


def test_a_text_encoder_counts_with_the_lengths_that_ran(metrics, tmp_path):
  metrics, _, clock = metrics
  metrics.flops, metrics.model_flops, metrics.peak = 1.2e12, 1e12, 2e12
  metrics.spared = [4e11, 3e11, 0]
  step = dict(loss=2.0, grad_norm=1.0, param_norm=3.0, skipped=0)
  step |= dict(band_loss=np.ones(4), band_count=np.ones(4))
  ran = [0.75, 0.0, 0.25], [0.25, 0.5, 0.25]
  recent = [step | {'text_buckets': np.array(some)} for some in ran]
  clock.pass_seconds(2)
  metrics.log(2, 8, recent, [])
  row = rows(tmp_path)[2]
  spared = 0.5 * 0.4 + 0.25 * 0.3  # TFLOPs a step, of a second
  assert row['tflops_per_device'] == pytest.approx(1 - spared)
  assert row['mfu_percent'] == pytest.approx(50 * (1 - spared), abs=0.01)
  assert row['hfu_percent'] == pytest.approx(50 * (1.2 - spared), abs=0.01)


def test_evaluation_is_not_training_time(metrics, tmp_path):
  metrics, ledger, clock = metrics
  clock.pass_seconds(10)
  with ledger.spent('eval'):
    clock.pass_seconds(50)
  clock.pass_seconds(1)
  metrics.log(1, 22, [], [])
  row = rows(tmp_path)[1]
  assert (row['images_per_sec'], row['seconds_eval']) == (2.0, 50.0)


def test_the_report_says_what_every_device_will_hold(watched):
  text = '\n'.join(watched[2])
  for words in ('encoder', 'mesh: data 2 × fsdp 1 = 2 cpu', 'FLOPs'):
    assert words in text
  mesh = sharding.make_mesh(2, 4)
  tree = {'w': jax.ShapeDtypeStruct((256, 256), np.float32)}
  shardings = sharding.state_shardings(tree, mesh)
  real = jax.device_put(np.zeros((256, 256), np.float32), shardings['w'])
  mine = report.device_bytes(tree, shardings)
  assert mine == real.addressable_shards[0].data.nbytes == 4 * 256 * 256 // 4


def test_devices_hold_their_fraction_and_the_small_arrays_which_are_listed():
  config = load_config('shapes_base')
  stage = stage_config.from_config(
    config.stage.to_dict(), text_dim=128, text_len=32
  )
  tx = make_optimizer(config.train)
  state = jax.eval_shape(
    lambda: init_state(stages.init_params(stage, jax.random.key(0)), tx)
  )
  mesh = sharding.make_mesh(1, 8)
  shardings = sharding.state_shardings(state, mesh)
  first, second, *listed = report.splits(state, shardings, 8)
  held, size = map(
    float, re.search(r'([\d.]+) of ([\d.]+) MiB', first).groups()
  )
  assert held == pytest.approx(size / 8, rel=0.05) and size > 15
  whole = float(re.search(r'whole, ([\d.]+) MiB', second)[1])
  assert sum(float(line.split()[-2]) for line in listed) == pytest.approx(
    whole, abs=0.02
  )
  assert held + whole == pytest.approx(
    report.device_bytes(state, shardings) / 2**20, abs=0.02
  )
  assert any('norm1/scale' in line for line in listed)


def test_a_logger_gets_the_numbers_and_the_grids(watched):
  calls = watched[3].calls
  scalars = {(a[0], a[2]) for name, a in calls if name == 'add_scalar'}
  assert {('loss', 2), ('heldout_loss_ema', 6)} <= scalars
  grids = [a for name, a in calls if name == 'add_image']
  assert [a[2] for a in grids] == [3, 6] and grids[0][1].dtype == np.uint8
  assert calls[-1][0] == 'close'


def test_weights_and_biases_resumes_under_the_workdirs_name(
  tmp_path, monkeypatch
):
  made = []
  module = types.SimpleNamespace(
    init=lambda **options: made.append(options) or FakeWriter(),
    Image=lambda image: image,
  )
  monkeypatch.setitem(sys.modules, 'wandb', module)
  (wandb,) = find_loggers('wandb')
  logger = wandb(tmp_path / 'runs/base', {}, 4)
  logger.scalars(5, {'loss': 1.0})
  assert made[0]['id'].endswith('runs-base')
  assert made[0]['resume'] == 'allow'
  assert FakeWriter.made[-1].calls == [('log', ({'loss': 1.0},))]


@pytest.mark.parametrize('names', ['tensorbord', 'wandb'])
def test_a_logger_that_is_not_there_is_refused_by_name(
  config, tmp_path, monkeypatch, names
):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  monkeypatch.setattr(loop, 'make_experiment', None)  # it is not called
  config = config.copy_and_resolve_references()
  config.train.log_to = names
  with pytest.raises(UsageError, match=names) as error:
    loop.train(config, tmp_path / 'w', dry_run=True)
  assert error.value.key == 'config.train.log_to'


def test_a_dry_run_writes_nothing(config, tmp_path, capsys):
  assert loop.train(config, tmp_path / 'w', dry_run=True) == 0
  assert 'a device holds' in capsys.readouterr().out
  assert not (tmp_path / 'w').exists()


def still(config):
  """The config with a learning rate of zero."""
  config = config.copy_and_resolve_references()
  config.train.update(log_to='', num_steps=1, eval_every=None)
  config.train.optimizer.learning_rate = 0.0
  return config


def test_a_warm_start_begins_with_the_other_runs_ema(watched, tmp_path):
  config, folder, *_ = watched
  loop.train(still(config), tmp_path / 'w', init_from=folder)
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    ema = checkpoints.restore_subtree('ema_params')[0]
  with Checkpoints(tmp_path / 'w/checkpoints') as checkpoints:
    for part in ('params', 'ema_params'):
      mine = checkpoints.restore_subtree(part)[0]
      jax.tree.map(np.testing.assert_array_equal, mine, ema)
  record = json.loads((tmp_path / 'w/config.json').read_text())
  assert record['init_from']['path'] == str(folder)


def test_a_warm_start_from_another_network_is_refused(config, model, tmp_path):
  config.stage.net.channels = 16
  with pytest.raises(ModelError, match='base'):
    loop.train(config, tmp_path / 'w', init_from=model / 'base')


def claim(folder, config, **options):
  text = {'dim': 4, 'max_len': 12, 'digest': 'd'}
  workdir.claim(folder, config, text, **options)


def test_force_resumes_with_another_config(config, tmp_path):
  claim(tmp_path, config)
  config.stage.cond_drop = 0.2
  with pytest.raises(UsageError, match='stage.cond_drop'):
    claim(tmp_path, config)
  claim(tmp_path, config, force=True)
  record = json.loads((tmp_path / 'config.json').read_text())
  assert record['config']['stage']['cond_drop'] == 0.2


def test_another_data_set_is_refused(config, tmp_path):
  claim(tmp_path, config, data={'fingerprint': 'one', 'length': 3})
  claim(tmp_path, config, data={'fingerprint': 'one', 'length': 3})
  with pytest.raises(UsageError, match='data.fingerprint'):
    claim(tmp_path, config, data={'fingerprint': 'two', 'length': 3})
  with pytest.raises(UsageError, match='data.length'):
    claim(tmp_path, config, data={'fingerprint': 'one', 'length': 4})


def test_a_profile_of_some_steps_is_written(tmp_path):
  with Profiler(3, tmp_path / 'profile') as profiler:
    for step in range(1, 10):
      profiler.before(step)
      assert (tmp_path / 'profile').exists() == (step > 7)
      profiler.after(step, jax.numpy.zeros(2))
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_a_hang_ends_the_run_with_the_stacks_and_a_sentence(capfd):
  said = []
  with Watchdog(9, 0.2, end=said.append) as alive:
    time.sleep(0.4)
    assert not said  # compiling may take long
    alive.beat(7)
    time.sleep(0.5)
  assert len(said) == 1 and 'step after 7' in said[0]
  assert 'hang_seconds' in said[0]
  stacks = capfd.readouterr().err
  assert 'watchdog.py' in stacks and 'watch_test.py' in stacks


def test_a_phase_of_the_start_has_a_limit_of_its_own(capfd):
  said = []
  with Watchdog(0.4, 9, end=said.append) as alive:
    for phase in ('joining', 'restoring', 'compiling'):
      alive.phase(phase)
      time.sleep(0.2)
    assert not said
    time.sleep(0.5)
  assert len(said) == 1 and said[0].startswith('compiling')
  assert 'startup_seconds' in said[0]


def test_a_run_that_makes_progress_is_left_alone():
  said = []
  with Watchdog(0, 0.3, end=said.append) as alive:
    time.sleep(0.4)  # 0 is no limit
    for step in range(8):
      alive.beat(step)
      time.sleep(0.1)
  time.sleep(0.5)
  assert not said


@pytest.mark.parametrize(
  'argv',
  [
    ['--coordinator', 'a:1'],
    ['--distributed', '--process_id', '0'],
    ['--coordinator', 'a:1', '--num_processes', '2', '--process_id', '2'],
  ],
)
def test_flags_of_processes_that_contradict_are_refused(argv):
  parser = cli.errors.Parser()
  runtime.add_process_flags(parser)
  with pytest.raises(UsageError):
    runtime._join(parser.parse_args(argv))


def test_the_peak_of_a_device_is_found_by_its_name():
  assert chips.find_peak('TPU v5 lite') == chips.CHIPS['v5e'].flops
  assert chips.find_peak('TPU v5') == chips.CHIPS['v5p'].flops
  assert chips.find_peak('NVIDIA H100 80GB HBM3') == chips.CHIPS['h100'].flops
  assert chips.find_peak('cpu') is None


def test_a_run_does_not_begin_anew_because_its_checkpoints_are_elsewhere(
  tmp_path,
):
  config = tiny_model.config()
  workdir.claim(tmp_path / 'w', config, None)
  (tmp_path / 'w/checkpoints/3').mkdir(parents=True)
  config.train.checkpoint_dir = str(tmp_path / 'new')
  with pytest.raises(UsageError) as error:
    workdir.claim(tmp_path / 'w', config, None)
  assert error.value.key == 'config.train.checkpoint_dir'
  (tmp_path / 'new/3').mkdir(parents=True)  # copied
  workdir.claim(tmp_path / 'w', config, None)
