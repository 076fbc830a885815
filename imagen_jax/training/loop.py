"""The training loop, top to bottom: build, restore, step, save."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from imagen_jax import sharding
from imagen_jax.data.checked import write_skipped
from imagen_jax.dtypes import pinned
from imagen_jax.io import bucket, model_folder
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.training import power_ema, report
from imagen_jax.training import workdir as workdirs
from imagen_jax.training.experiment import Experiment, make_experiment
from imagen_jax.training.input import train_batches
from imagen_jax.training.loggers import find_loggers
from imagen_jax.training.monitor import Monitor, Run
from imagen_jax.training.program import Program, make_program
from imagen_jax.training.state import TrainState


@pinned()
def train(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  *,
  should_stop: Callable[[int], bool] = lambda step: False,
  init_from: str | pathlib.Path | None = None,
  force: bool = False,
  dry_run: bool = False,
) -> int:
  """Trains up to step `config.train.num_steps`, resuming the workdir's run.

  Args:
    config: of an experiment, such as `configs/imagen_base64.py`'s.
    workdir: the run's directory, local or gs://…: `config.json`,
      `checkpoints/`, `metrics.jsonl`, `samples/`. A run of the same config in
      it is resumed.
    should_stop: called after every step with its number; True saves and
      returns early. It must return the same on all processes.
    init_from: a training workdir or an exported stage whose EMA a new run
      starts from; a resumed run does not use it.
    force: resume although the config or the data set has changed, and begin
      anew where there are checkpoints and none is whole.
    dry_run: print what would run, write nothing, and return 0.

  Returns:
    the number of the last step.

  Raises:
    UsageError: the config is invalid or not the workdir's, or another process
      trains there.
    ModelError: the text encoder or every checkpoint is unusable.
    NumericError: too many steps in a row were NaN or Inf.
  """
  workdir = bucket.at(workdir)
  find_loggers(config.train.log_to)  # what is wrong there is said at the start
  experiment = make_experiment(config, workdir)
  program = make_program(experiment, experiment.mesh)
  if jax.process_index() == 0:
    for line in report.startup(program, arrays=dry_run):
      print(line, flush=True)
  if dry_run:
    return 0
  warm = None if init_from is None else model_folder.load_stage(init_from)
  checkpoint_dir = config.train.checkpoint_dir or workdir / 'checkpoints'
  with (
    workdirs.locked(workdir, checkpoint_dir),
    Checkpoints(
      checkpoint_dir,
      keep_last=config.train.keep_last,
      keep_every=config.train.keep_every,
    ) as checkpoints,
  ):
    _claim(experiment, workdir, warm, force)
    return _run(program, checkpoints, workdir, warm, should_stop, force)


def _run(
  program: Program,
  checkpoints: Checkpoints,
  workdir: pathlib.Path,
  warm: StageRecord | None,
  should_stop: Callable[[int], bool],
  force: bool,
) -> int:
  """Restores, trains and finishes; returns the number of the last step."""
  experiment = program.experiment
  frozen = experiment.load_frozen()
  state, start = _first_state(program, checkpoints, warm, force)
  with _snapshots(program, checkpoints, start) as snapshots:
    run = Run(program, frozen, checkpoints, snapshots, workdir, start)
    monitor = Monitor(run)
    with jax.set_mesh(experiment.mesh), monitor:
      step, state = _steps(run, state, monitor, should_stop)
      if step >= experiment.config.train.num_steps:
        experiment.finish(state, frozen)
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
) -> None:
  """Claims the workdir, and lists the samples that the data set skips."""
  source = experiment.source('train')
  init_from = None
  if warm is not None:
    digest = model_folder.weights_digest(warm)
    init_from = {'path': str(warm.path), 'digest': digest}
  workdirs.claim(
    workdir,
    experiment.config,
    experiment.text_record(),
    data={'fingerprint': source.fingerprint, 'length': len(source)},
    init_from=init_from,
    force=force,
  )
  if jax.process_index() == 0 and source.skipped:
    write_skipped(workdir / 'bad_samples.jsonl', source.skipped)


def _first_state(
  program: Program,
  checkpoints: Checkpoints,
  warm: StageRecord | None,
  force: bool,
) -> tuple[TrainState, int]:
  """(state, its step) of the newest good checkpoint or of a new run."""
  if workdirs.must_resume(checkpoints, program.experiment.config, force):
    state, _, step = checkpoints.restore(program.abstract_state())
    origin = f'resumes after step {step}'
  else:
    first = program.experiment.start(program.shardings.params, warm)
    state, step, origin = program.first_state(first.params), 0, first.origin
  if jax.process_index() == 0:
    print(f'{program.experiment.name}: {origin}', flush=True)
  return state, step


def _steps(
  run: Run,
  state: TrainState,
  monitor: Monitor,
  should_stop: Callable[[int], bool],
) -> tuple[int, TrainState]:
  """Runs the remaining steps; returns (last step, state)."""
  program, experiment = run.program, run.program.experiment
  train_cfg, step = experiment.config.train, run.start
  data = train_batches(experiment, run.start)
  for step in range(run.start + 1, train_cfg.num_steps + 1):
    batch = monitor.next_batch(step, data)
    batch = sharding.put_batch(batch, experiment.mesh)
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      state, values = program.step(state, batch, run.frozen)
    monitor.after(step, state, values)
    stopping = should_stop(step)
    monitor.report(step, state)
    last = step == train_cfg.num_steps
    if run.snapshots and (last or step % train_cfg.ema_every == 0):
      # Complete before the checkpoint: a resumed run does not save it again.
      run.snapshots.save(step, {'emas': state.emas}, wait=True)
    if last or stopping or step % train_cfg.checkpoint_every == 0:
      run.checkpoints.save(step, state, {'data_step': step})
    if stopping:
      break
  return step, state
