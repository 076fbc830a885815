"""The training loop, top to bottom: build, restore, step, save."""

import collections
import contextlib
import copy
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from imagen_jax.data.checked import write_skipped
from imagen_jax.dtypes import pinned
from imagen_jax.io import bucket, model_folder
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.io.local_tier import LocalTier
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.training import cpu_layout, peers, power_ema, report
from imagen_jax.training import ledger as ledgers
from imagen_jax.training import workdir as workdirs
from imagen_jax.training.experiment import Experiment, make_experiment
from imagen_jax.training.input import Ahead, train_batches
from imagen_jax.training.ledger import Ledger
from imagen_jax.training.loggers import find_loggers
from imagen_jax.training.monitor import Monitor, Run
from imagen_jax.training.program import Program, make_program
from imagen_jax.training.state import TrainState
from imagen_jax.training.watchdog import Watchdog

# Steps that are dispatched and not known to be finished. With two, a device
# always has the next one; with more, a stop or an error would come late.
RUN_AHEAD = 2


@pinned()
def train(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  *,
  should_stop: Callable[[int], bool] = lambda step: False,
  init_from: str | pathlib.Path | None = None,
  force: bool = False,
  dry_run: bool = False,
  began: float | None = None,
) -> int:
  """Trains up to step `config.train.num_steps`, resuming the workdir's run.

  Args:
    config: of an experiment, such as `configs/imagen_base64.py`'s.
    workdir: the run's directory, local or gs://…: `config.json`,
      `checkpoints/`, `metrics.jsonl`, `goodput.json`, `samples/`. A run of the
      same config in it is resumed.
    should_stop: called after every step with its number; True saves and
      returns early. It must return the same on all processes.
    init_from: a training workdir or an exported stage whose EMA a new run
      starts from; a resumed run does not use it.
    force: resume although the config or the data set has changed, and begin
      anew where there are checkpoints and none is whole.
    dry_run: print what would run, write nothing, and return 0.
    began: `time.time()` of the start of the process; None means now.

  Returns:
    the number of the last step.

  Raises:
    UsageError: the config is invalid or not the workdir's, or another process
      trains there.
    ModelError: the text encoder or every checkpoint is unusable.
    NumericError: too many steps in a row were NaN or Inf.
  """
  workdir, ledger = bucket.at(workdir), Ledger(began)
  find_loggers(config.train.log_to)  # what is wrong there is said at the start
  limits = config.train.startup_seconds, config.train.hang_seconds
  job = peers.current()
  with Watchdog(*limits, end=job.abort) as alive:
    config = copy.deepcopy(config)
    stored = workdirs.stored_config(workdir)
    said = cpu_layout.settle(config, stored, measure=not dry_run)
    experiment = make_experiment(config, workdir)
    with ledger.spent('compile'):
      program = make_program(experiment, experiment.mesh, keep=True)
      if jax.process_index() == 0:
        for line in report.startup(program, arrays=dry_run):
          print(line, flush=True)
        if said:
          print(f'  {said}', flush=True)
    if dry_run:
      return 0
    warm = None if init_from is None else model_folder.load_stage(init_from)
    checkpoint_dir = model_folder.checkpoint_folder(workdir, config)
    with (
      workdirs.locked(workdir, checkpoint_dir),
      ledger,
      Checkpoints(
        checkpoint_dir,
        keep_last=config.train.keep_last,
        keep_every=config.train.keep_every,
      ) as checkpoints,
      job.told(busy=lambda: checkpoints.saving, where=alive.where),
    ):
      run = _claim(experiment, workdir, warm, force)
      local = workdirs.local_tier(config, workdir, run)
      with local or contextlib.nullcontext():
        tiers = checkpoints, local
        made = _Made(program, tiers, workdir, warm, force, alive, ledger)
        step = _run(made, should_stop)
  if jax.process_index() == 0:
    for line in ledger.table():
      print(line, flush=True)
  return step


@dataclasses.dataclass(frozen=True)
class _Made:
  """What a run is made of before its state.

  Attributes:
    program: the compiled step.
    tiers: where the state is saved, for good and on this host's own disk.
    workdir: the run's directory.
    warm: the stage whose EMA a new run starts from.
    force: see `train`.
    alive: the watchdog.
    ledger: of the wall time.
  """

  program: Program
  tiers: tuple[Checkpoints, LocalTier | None]
  workdir: pathlib.Path
  warm: StageRecord | None
  force: bool
  alive: Watchdog
  ledger: Ledger


def _run(made: _Made, should_stop: Callable[[int], bool]) -> int:
  """Restores, trains and finishes; returns the number of the last step."""
  program, alive, ledger = made.program, made.alive, made.ledger
  (checkpoints, local), experiment = made.tiers, program.experiment
  alive.phase('restoring the state')
  frozen = experiment.load_frozen()
  state, start = _first_state(made)
  with _snapshots(program, checkpoints, start) as snapshots:
    run = Run(
      program=program,
      frozen=frozen,
      checkpoints=checkpoints,
      snapshots=snapshots,
      local=local,
      workdir=made.workdir,
      start=start,
      ledger=ledger,
    )
    alive.phase('compiling and running the first step')
    monitor = Monitor(run)
    with jax.set_mesh(experiment.mesh), monitor:
      ledger.enter('compile')
      step, state = _steps(run, state, monitor, should_stop, alive)
      ledger.enter('other')
      if step >= experiment.config.train.num_steps:
        ema = program.as_params(state.ema_params)
        experiment.finish(dataclasses.replace(state, ema_params=ema), frozen)
        with ledger.spent('save'):
          checkpoints.wait()  # the local tier is needed until then
        if local:
          local.clear()
        ledger.finished = True
  ledger.enter('save')  # what is left of the last one
  return step


@contextlib.contextmanager
def _snapshots(
  program: Program, checkpoints: Checkpoints, start: int
) -> Iterator[Checkpoints | None]:
  """The snapshots of the run's power-function EMAs; None if it has none."""
  if not program.experiment.config.train.ema_lengths:
    yield None
    return
  folder = checkpoints.directory / power_ema.FOLDER
  with Checkpoints(folder, keep_every=1) as snapshots:
    snapshots.discard_after(start)
    yield snapshots


def _claim(
  experiment: Experiment,
  workdir: pathlib.Path,
  warm: StageRecord | None,
  force: bool,
) -> str:
  """Claims the workdir, and lists the samples that the data set skips."""
  source = experiment.source('train')
  init_from = None
  if warm is not None:
    digest = model_folder.weights_digest(warm)
    init_from = {'path': str(warm.path), 'digest': digest}
  run = workdirs.claim(
    workdir,
    experiment.config,
    experiment.text_record(),
    data={'fingerprint': source.fingerprint, 'length': len(source)},
    init_from=init_from,
    force=force,
  )
  if jax.process_index() == 0 and source.skipped:
    write_skipped(workdir / 'bad_samples.jsonl', source.skipped)
  return run


def _first_state(made: _Made) -> tuple[TrainState, int]:
  """(state, its step) of the newest good checkpoint or of a new run."""
  program, ledger = made.program, made.ledger
  kept: dict[str, float] = {}
  with ledger.spent('restore'):
    found = workdirs.newest_state(
      *made.tiers,
      program.abstract_state(),
      program.experiment.config,
      made.force,
    )
  if found is not None:
    state, extra, step = found
    kept, origin = extra.get('seconds', {}), f'resumes after step {step}'
  else:
    first = program.experiment.start(program.shardings.params, made.warm)
    state, step, origin = program.first_state(first.params), 0, first.origin
  first_process = jax.process_index() == 0
  ledger.resume(made.workdir / ledgers.FILE if first_process else None, kept)
  if first_process:
    print(f'{program.experiment.name}: {origin}', flush=True)
  return state, step


def _steps(
  run: Run,
  state: TrainState,
  monitor: Monitor,
  should_stop: Callable[[int], bool],
  alive: Watchdog,
) -> tuple[int, TrainState]:
  """Runs the remaining steps; returns (last step, state)."""
  program, experiment = run.program, run.program.experiment
  job = peers.current()
  num_steps, step = experiment.config.train.num_steps, run.start
  data = Ahead(train_batches(experiment, run.start), RUN_AHEAD + 1)
  running: collections.deque[dict] = collections.deque()
  end: int | None = None  # the step before a batch that cannot be read
  for step in range(run.start + 1, num_steps + 1):
    job.check()
    batch = monitor.next_batch(step, data)
    if end is None and data.error and step + len(data) < num_steps:
      end = _agree(data.error, step, len(data))
    if len(running) == RUN_AHEAD:
      jax.block_until_ready(running.popleft())
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      state, values = program.run(state, batch, run.frozen)
    running.append(values)
    monitor.after(step, state, values)
    alive.beat(step)
    stopping = should_stop(step) or step == end or job.stops_after(step)
    if stopping:  # there may be little time for what follows
      _save(run, monitor, step, state, stopping=True)
    monitor.report(step, state)
    if not stopping:
      _save(run, monitor, step, state)
      continue
    if step == end and data.error:
      raise data.error
    job.check_stop(step)
    break
  return step, state


def _agree(error: Exception, step: int, left: int) -> int:
  """The step after which all processes save, since a batch cannot be read.

  The others may have dispatched two steps more than this process, which has
  dispatched those before `step` and has the batches of it and `left` more.
  """
  if jax.process_count() > 1:
    if left < RUN_AHEAD:
      raise error  # so near the start there is little to save
    peers.current().stop_after(step + left, error)
  return step + left


def _save(
  run: Run,
  monitor: Monitor,
  step: int,
  state: TrainState,
  *,
  stopping: bool = False,
) -> None:
  """Saves what is due after a step."""
  train_cfg = run.program.experiment.config.train
  last = step == train_cfg.num_steps
  if run.snapshots and (last or step % train_cfg.ema_every == 0):
    # Complete before the checkpoint: a resumed run does not save it again.
    monitor.settle()
    with run.ledger.spent('save'):
      run.snapshots.save(step, {'emas': state.emas}, wait=True)
  tier: Checkpoints | LocalTier
  if last or stopping or step % train_cfg.checkpoint_every == 0:
    tier = run.checkpoints
  elif run.local and step % train_cfg.local_checkpoint_every == 0:
    tier = run.local
  else:
    return
  extra = {'data_step': step, 'seconds': monitor.settle()}
  with run.ledger.spent('save'):
    tier.save(step, state, extra)
    if stopping:
      run.checkpoints.wait()
