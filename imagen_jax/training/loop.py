"""The training loop, top to bottom: build, restore, step, save."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from imagen_jax import sharding
from imagen_jax.data.sources import list_skipped
from imagen_jax.io import images as image_io
from imagen_jax.io import model_folder
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.training import chips, report
from imagen_jax.training import workdir as workdirs
from imagen_jax.training.experiment import (
  Experiment,
  Preview,
  Tree,
  make_experiment,
)
from imagen_jax.training.guard import check_finite
from imagen_jax.training.heldout import make_heldout_loss
from imagen_jax.training.input import split_index, train_batches
from imagen_jax.training.loggers import Logger, make_loggers
from imagen_jax.training.metrics import Metrics
from imagen_jax.training.profiling import Profiler
from imagen_jax.training.program import Program, make_program
from imagen_jax.training.state import TrainState
from imagen_jax.training.watchdog import Watchdog


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
    workdir: the run's directory: `config.json`, `checkpoints/`,
      `metrics.jsonl`, `samples/`. A run of the same config in it is resumed.
    should_stop: called after every step with its number; True saves and
      returns early. It must return the same on all processes.
    init_from: a training workdir or an exported stage whose EMA a new run
      starts from; a resumed run does not use it.
    force: resume although the config or the data set has changed.
    dry_run: print what would run, write nothing, and return 0.

  Returns:
    the number of the last step.

  Raises:
    UsageError: the config is invalid, or is not the workdir's.
    ModelError: the text encoder or every checkpoint is unusable.
    NumericError: too many steps in a row were NaN or Inf.
  """
  workdir = pathlib.Path(workdir)
  experiment = make_experiment(config, workdir)
  program = make_program(experiment, experiment.mesh)
  if jax.process_index() == 0:
    for line in report.startup(program, arrays=dry_run):
      print(line, flush=True)
  if dry_run:
    return 0
  warm = None if init_from is None else model_folder.load_stage(init_from)
  _claim(experiment, workdir, warm, force)
  frozen = experiment.load_frozen()
  train_cfg = config.train
  with Checkpoints(
    train_cfg.checkpoint_dir or workdir / 'checkpoints',
    keep_last=train_cfg.keep_last,
    keep_every=train_cfg.keep_every,
  ) as checkpoints:
    state, start = _first_state(program, checkpoints, warm)
    run = _Run(program, frozen, checkpoints, workdir, start)
    with jax.set_mesh(experiment.mesh), _Monitor(run) as monitor:
      step, state = _steps(run, state, monitor, should_stop)
      if step >= train_cfg.num_steps:
        experiment.finish(state, frozen)
  return step


@dataclasses.dataclass(frozen=True)
class _Run:
  """What stays the same over the steps of a run.

  Attributes:
    program: the compiled step.
    frozen: of the experiment, on the mesh.
    checkpoints: where the state is saved.
    workdir: the run's directory.
    start: the step that it resumes from.
  """

  program: Program
  frozen: Tree
  checkpoints: Checkpoints
  workdir: pathlib.Path
  start: int


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
  first_process = jax.process_index() == 0
  workdirs.claim(
    workdir,
    experiment.config,
    experiment.text_record(),
    fingerprint=source.fingerprint,
    init_from=init_from,
    force=force,
    write=first_process,
  )
  if first_process:
    list_skipped(source, workdir / 'bad_samples.jsonl')


def _first_state(
  program: Program, checkpoints: Checkpoints, warm: StageRecord | None
) -> tuple[TrainState, int]:
  """(state, its step) of the newest good checkpoint or of a new run."""
  if checkpoints.latest_step() is not None:
    state, _, step = checkpoints.restore(program.abstract_state())
    origin = f'resumes after step {step}'
  else:
    first = program.experiment.start(program.shardings.params, warm)
    state, step, origin = program.first_state(first.params), 0, first.origin
  if jax.process_index() == 0:
    print(f'{program.experiment.name}: {origin}', flush=True)
  return state, step


def _steps(
  run: _Run,
  state: TrainState,
  monitor: '_Monitor',
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
    if last or stopping or step % train_cfg.checkpoint_every == 0:
      run.checkpoints.save(step, state, {'data_step': step})
    if stopping:
      break
  return step, state


class _Monitor(contextlib.ExitStack):
  """Everything that watches a run: metrics, samples, profile, watchdog."""

  def __init__(self, run: _Run):
    super().__init__()
    self._run, self._experiment = run, run.program.experiment
    self._train_cfg = train_cfg = self._experiment.config.train
    self._recent: list[dict] = []
    self._preview = self._heldout_loss = None
    if train_cfg.sample_every:
      self._preview = self._experiment.make_preview(run.frozen)
    if train_cfg.eval_every and self._experiment.has_eval_split():
      self._heldout_loss = make_heldout_loss(self._experiment, run.frozen)
    self._seen: collections.deque[tuple[int, np.ndarray]] = collections.deque(
      maxlen=train_cfg.max_bad_steps
    )
    self._metrics = self.enter_context(_metrics(run))
    self._alive = self.enter_context(Watchdog(train_cfg.hang_seconds))
    self._profiler = self.enter_context(
      Profiler(train_cfg.profile_at, run.workdir / 'profile')
    )

  def next_batch(self, step: int, data: Iterator[dict]) -> dict:
    """A step's batch; records its examples and the seconds of waiting."""
    self._profiler.before(step)
    begin = time.perf_counter()
    batch, index = split_index(next(data))
    self._metrics.waited(time.perf_counter() - begin)
    self._seen.append((step, index))
    return batch

  def after(self, step: int, state: TrainState, values: dict) -> None:
    """Called after each step, with its results, still on the devices."""
    self._recent.append(values)
    self._profiler.after(step, state)
    if step == self._run.start + 1:
      jax.block_until_ready(state)
      self._metrics.start(step)  # do not count the compilation
      self._recent = [values]
    self._alive.beat(step)

  def report(self, step: int, state: TrainState) -> None:
    """Evaluates, logs and samples when the config says so.

    Raises:
      NumericError: too many steps in a row were NaN or Inf.
    """
    train_cfg = self._train_cfg
    last = step == train_cfg.num_steps
    more = {}
    if self._heldout_loss and (last or step % train_cfg.eval_every == 0):
      with self._metrics.paused():
        more['heldout_loss'] = self._heldout_loss(state.params)
        more['heldout_loss_ema'] = self._heldout_loss(state.ema_params)
    if more or last or step % train_cfg.log_every == 0:
      source = self._experiment.source('train')
      more['bad_samples'] = len(source.bad)
      self._metrics.log(step, train_cfg.batch_size, self._recent, **more)
      self._recent = []
      limit = train_cfg.max_bad_steps
      check_finite(state, step, limit, self._seen, source, self._run.workdir)
    if self._preview and (last or step % train_cfg.sample_every == 0):
      with self._metrics.paused():
        self._keep(step, self._preview(state.ema_params))

  def _keep(self, step: int, sample: Preview | None) -> None:
    """Writes a preview, an image or text; it is None off process 0."""
    path = self._run.workdir / 'samples' / f'step_{step:07d}'
    if isinstance(sample, np.ndarray):
      image_io.save_png(path.with_suffix('.png'), sample)
      self._metrics.image(step, sample)
    elif sample is not None:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.with_suffix('.txt').write_text(sample + '\n', encoding='utf-8')


def _metrics(run: _Run) -> Metrics:
  """The `Metrics` of a run; process 0 writes."""
  config, mesh = run.program.experiment.config, run.program.mesh
  loggers: list[Logger] = []
  first_process = jax.process_index() == 0
  if first_process:
    loggers = make_loggers(
      config.train.log_to, run.workdir, config.to_dict(), start_step=run.start
    )
  return Metrics(
    run.workdir / 'metrics.jsonl',
    start_step=run.start,
    num_steps=config.train.num_steps,
    write=first_process,
    devices=mesh.size,
    flops=run.program.flops,
    peak=chips.find_peak(mesh.devices.flat[0].device_kind),
    loggers=loggers,
  )
