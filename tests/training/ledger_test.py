"""The ledger of a run's wall time, the pace of its steps, and slow hosts."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import torture_runs
from imagen_jax.data import pipeline
from imagen_jax.errors import ModelError
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.training import ledger as ledgers
from imagen_jax.training import loop, pace
from imagen_jax.training.flops import count_flops, has_remat, without_remat
from imagen_jax.training.ledger import LOST, Ledger
from imagen_jax.training.metrics import Metrics
from imagen_jax.training.pace import Pace, Step
from tests import tiny_model


class Clock:
  """A clock that a test moves."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    for name in ('time', 'perf_counter'):
      monkeypatch.setattr(time, name, lambda: self.now)

  def spend(self, ledger, part, seconds):
    with ledger.spent(part):
      self.now += seconds


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


def test_a_part_within_another_is_taken_out_of_it(clock):
  ledger = Ledger(began=990.0)
  with ledger.spent('step'):
    clock.now += 4
    clock.spend(ledger, 'eval', 3)
    clock.now += 2
  ledger.move(1.5, 'step', 'data_wait')
  found = {part: n for part, n in ledger.read().items() if n}
  assert found == {'init': 10, 'step': 4.5, 'data_wait': 1.5, 'eval': 3}
  assert ledgers.goodput(ledger.read()) == pytest.approx(100 * 4.5 / 19)
  assert next(ledger.table()).startswith('goodput 23.7 % of 0m19s')


def test_a_restart_moves_lost_steps_to_redone_and_counts_the_time_between(
  clock, tmp_path
):
  path, first = tmp_path / ledgers.FILE, Ledger()
  first.resume(path, {})
  clock.spend(first, 'compile', 5)
  clock.spend(first, 'step', 20)
  kept = first.read()  # of a checkpoint
  clock.spend(first, 'save', 2)
  clock.spend(first, 'step', 7)
  clock.spend(first, 'eval', 1)
  first.write()  # the last sign of life
  clock.now += 60
  second = Ledger(began=clock.now - 3)
  second.resume(path, kept)
  clock.spend(second, 'restore', 4)
  assert {part: n for part, n in second.read().items() if n} == {
    'compile': 5,
    'step': 20,
    'save': 2,
    'redone': 8,
    'down': 57,
    'init': 3,
    'restore': 4,
  }
  third = Ledger(began=clock.now)  # the second got no further
  third.resume(path, kept)
  assert third.seconds['redone'] == 8 and third.starts == 3
  assert sum(third.read().values()) == clock.now - 1000


def test_the_time_after_the_end_of_a_run_is_not_down(clock, tmp_path):
  path, ledger = tmp_path / ledgers.FILE, Ledger()
  ledger.resume(path, {})
  ledger.finished = True
  ledger.write()
  clock.now += 10**6
  longer = Ledger()
  longer.resume(path, {})
  assert longer.seconds['down'] == 0


@pytest.mark.parametrize(
  'text', ['{"seconds": ', '{"format_version": 1, "seconds": {"step": 1.0}}']
)
def test_a_damaged_ledger_is_refused_and_a_missing_one_is_the_checkpoints(
  tmp_path, text
):
  path, ledger = tmp_path / ledgers.FILE, Ledger()
  ledger.resume(path, {'step': 40.0})
  assert ledger.seconds['step'] == 40.0
  path.write_text(text)
  with pytest.raises(ModelError, match=ledgers.FILE), Ledger() as ledger:
    ledger.resume(path, {})
  assert path.read_text() == text


@pytest.fixture(scope='module')
def killed(model, tmp_path_factory):
  """(ledger on disk after a kill at step 5, and at the end, wall, workdir)."""
  config = tiny_model.config()
  config.text.path = str(model / 'text')
  workdir = tmp_path_factory.mktemp('killed') / 'base'

  def kill(step):
    if step == 5:
      raise KeyboardInterrupt
    return False

  began = time.time()
  with pytest.raises(KeyboardInterrupt):
    loop.train(config, workdir, should_stop=kill, began=began)
  before = json.loads((workdir / ledgers.FILE).read_text())
  time.sleep(0.5)
  assert loop.train(config, workdir) == 6
  after = json.loads((workdir / ledgers.FILE).read_text())
  return before, after, after['time'] - began, workdir


def test_the_parts_add_up_to_the_wall_time_of_a_run_that_was_killed(killed):
  _, after, wall, _ = killed
  assert sum(after['seconds'].values()) == pytest.approx(wall, rel=0.01)
  assert after['starts'] == 2 and after['finished']
  for part in ('step', 'compile', 'restore', 'init', 'save', 'data_wait'):
    assert after['seconds'][part] > 0, part


def test_redone_is_what_the_killed_run_spent_beyond_its_checkpoint(killed):
  before, after, _, workdir = killed
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    kept = checkpoints.verify(3)['seconds']
  lost = sum(before['seconds'][part] - kept[part] for part in LOST)
  assert after['seconds']['redone'] == pytest.approx(lost, abs=0.002) and lost
  assert 0.5 < after['seconds']['down'] < 0.6


def test_every_line_of_metrics_has_the_ledger(killed):
  *_, workdir = killed
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert [row['step'] for row in found] == [1, 2, 3, 4, 5, 6]
  first = found[0]['time'] - sum(ledgers_of(found[0]).values())
  for row in found:
    assert ledgers_of(row).keys() == ledgers.PARTS.keys()
    assert row['goodput_percent'] == pytest.approx(
      ledgers.goodput(ledgers_of(row)), abs=0.01
    )
    # All lines, before and after the kill, count from the same moment.
    assert row['time'] - sum(ledgers_of(row).values()) == pytest.approx(
      first, abs=0.05
    )


def ledgers_of(row):
  return {part: row[f'seconds_{part}'] for part in ledgers.PARTS}


class Result:
  """The result of a step that ends at a given time."""

  def __init__(self, clock, end):
    self._clock, self._end = clock, end

  def block_until_ready(self):
    self._clock.now = self._end


def test_only_the_waits_during_which_devices_are_idle_count(clock):
  with Pace() as paced:
    # (asked, batch there, on the devices), end
    paced.dispatched((0, 1, 2), Result(clock, 10))
    paced.dispatched((2, 9, 9.5), Result(clock, 18))  # hidden
    paced.dispatched((10, 20, 21), Result(clock, 30))  # 2 s of data, 1 of host
    paced.dispatched((100, 100, 100), Result(clock, 108))  # after a pause
    assert paced.take() == [(10, 1, 2), (8, 0, 0), (12, 2, 3), (8, 0, 0)]
    assert paced.take() == []


def test_waiting_for_another_hosts_data_is_data_wait(
  clock, tmp_path, monkeypatch
):
  hosts = np.asarray([(3.0, 0.5, 0.5), (3.0, 2.0, 2.0)])
  monkeypatch.setattr(pace, 'gather', lambda steps: hosts)
  ledger = Ledger()
  metrics = Metrics(
    tmp_path / 'metrics.jsonl', ledger, start_step=0, num_steps=9
  )
  with ledger.spent('step'):
    clock.now += 6
  ledger.move(1.0, 'step', 'data_wait')  # of the two steps on this host
  metrics.log(2, 8, [], [Step(3.0, 0.5, 0.5)] * 2)
  row = json.loads((tmp_path / 'metrics.jsonl').read_text())
  assert (row['seconds_step'], row['seconds_data_wait']) == (2.0, 4.0)
  assert row['step_seconds_p50'] == row['step_seconds_p99'] == 3.0
  assert (row['slow_host'], row['slow_host_ratio']) == (1, 2.0)


def test_the_host_whose_devices_wait_for_it_is_named_not_those_that_wait_too():
  # Everyone's step takes 1.5 s; the third host is half a second late.
  hosts = [Step(1.5, 0, 0), Step(1.5, 0, 0), Step(1.5, 0.4, 0.5)]
  slow = pace.find_slow(np.asarray(hosts))
  assert slow.host == 2
  assert slow.ratio == pytest.approx(1.5)
  assert slow.data == pytest.approx(0.8)
  assert pace.find_slow(np.asarray([(1.2, 0, 0), (1.2, 0, 0.2)])) is None
  assert pace.find_slow(np.asarray([(1.5, 0, 0.5)] * 3)) is None


@pytest.mark.slow
def test_a_host_that_reads_slowly_is_named_in_the_log(tmp_path, monkeypatch):
  monkeypatch.setenv('SLOW_AFTER', str(tmp_path / 'metrics.jsonl'))
  more = ('--config.data.kind=tests.slow_source:SlowSource',)
  more += ('--config.train.log_every=4', '--config.train.checkpoint_every=99')
  more += ('--config.train.check_replicas_every=4',)
  steps = 4 + 2 * pipeline.PREFETCH
  jobs = torture_runs.start(tmp_path, steps, *more, devices=1, processes=2)
  printed = [job.communicate()[0] for job in jobs]
  assert [job.returncode for job in jobs] == [0, 0], printed
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  row = json.loads(lines[-1])
  assert row['slow_host'] == 1
  assert row['slow_host_ratio'] > 1.3 and row['slow_host_data_percent'] > 90
  assert 'the host of process 1 is slow' in printed[0]
  # The devices of process 0, which writes this, waited for them too.
  assert row['data_wait_percent'] > 30


def test_flops_of_a_model_do_not_depend_on_rematerialization():
  def block(w, x):
    return jnp.tanh(x @ w) @ w

  def loss(block, w, x):
    x = jax.lax.scan(lambda h, _: (block(w, h), None), x, length=3)[0]
    x = jax.lax.cond(x.sum() > 0, lambda x: block(w, x), lambda x: x, x)
    return jnp.sum(block(w, x) ** 2)

  def flops(function):
    return count_flops(jax.make_jaxpr(jax.grad(function))(*inputs))

  inputs = jnp.ones((32, 32)), jnp.ones((4, 32))
  plain = jax.tree_util.Partial(loss, block)
  again = jax.tree_util.Partial(loss, jax.checkpoint(block))
  assert not has_remat(jax.make_jaxpr(jax.grad(plain))(*inputs))
  assert has_remat(jax.make_jaxpr(jax.grad(again))(*inputs))
  assert flops(again) > 1.15 * flops(plain)
  assert flops(without_remat(again)) == pytest.approx(flops(plain), rel=0.01)
  assert without_remat(again)(*inputs) == again(*inputs)


def test_the_error_of_a_run_is_not_replaced_by_one_of_its_ledger(tmp_path):
  (tmp_path / 'run').mkdir()
  with pytest.raises(ModelError), Ledger() as ledger:
    ledger.resume(tmp_path / 'run' / ledgers.FILE, {})
    (tmp_path / 'run' / ledgers.FILE).unlink()
    (tmp_path / 'run').rmdir()
    raise ModelError('the disk is full.')
