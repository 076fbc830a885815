"""Everything that watches a run: metrics, samples, profile."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from imagen_jax import sharding
from imagen_jax.io import files
from imagen_jax.io import images as image_io
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.io.local_tier import LocalTier
from imagen_jax.training import chips, replicas
from imagen_jax.training.experiment import Preview, Tree
from imagen_jax.training.guard import check_finite
from imagen_jax.training.heldout import make_heldout_loss
from imagen_jax.training.input import split_index
from imagen_jax.training.ledger import Ledger
from imagen_jax.training.loggers import Logger, find_loggers
from imagen_jax.training.metrics import Metrics
from imagen_jax.training.pace import Pace, Step
from imagen_jax.training.profiling import Profiler
from imagen_jax.training.program import Program
from imagen_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
  """What stays the same over the steps of a run.

  Attributes:
    program: the compiled step.
    frozen: of the experiment, on the mesh.
    checkpoints: where the state is saved.
    snapshots: where `train.ema_lengths` are saved; None: there are none.
    workdir: the run's directory.
    start: the step that it resumes from.
    local: where the state is saved on this host's own disk, if anywhere.
    ledger: of its wall time.
  """

  program: Program
  frozen: Tree
  checkpoints: Checkpoints
  snapshots: Checkpoints | None
  workdir: pathlib.Path
  start: int
  local: LocalTier | None
  ledger: Ledger


class Monitor(contextlib.ExitStack):
  """Feeds a run its batches, and logs, samples and guards its steps.

  Args:
    run: the run.
  """

  def __init__(self, run: Run):
    super().__init__()
    self._run, self._experiment = run, run.program.experiment
    self._train_cfg = train_cfg = self._experiment.config.train
    self._recent: list[dict] = []
    self._paced: list[Step] = []
    self._preview = self._heldout_loss = None
    if train_cfg.sample_every:
      self._preview = self._experiment.make_preview(run.frozen)
    if train_cfg.eval_every and self._experiment.has_eval_split():
      self._heldout_loss = make_heldout_loss(self._experiment, run.frozen)
    self._seen: collections.deque[tuple[int, np.ndarray]] = collections.deque(
      maxlen=train_cfg.max_bad_steps
    )
    self._metrics = self.enter_context(_metrics(run))
    self._pace = self.enter_context(Pace())
    self._profiler = self.enter_context(
      Profiler(train_cfg.profile_at, run.workdir / 'profile')
    )

  def next_batch(self, step: int, data: Iterator[dict]) -> dict:
    """A step's batch, on the devices; records its examples and the times."""
    self._profiler.before(step)
    asked = time.perf_counter()
    if step == self._run.start + 1:
      with self._run.ledger.spent('data_wait'):
        batch, index = split_index(next(data))
    else:  # `settle` knows how much of it the devices waited
      batch, index = split_index(next(data))
    there = time.perf_counter()
    self._seen.append((step, index))
    batch = sharding.put_batch(batch, self._experiment.mesh)
    self._times = asked, there, time.perf_counter()
    return batch

  def after(self, step: int, state: TrainState, values: dict) -> None:
    """Called after each step, with its results, still on the devices."""
    self._recent.append(values)
    self._profiler.after(step, state)
    if step == self._run.start + 1:
      jax.block_until_ready(state)
      self._run.ledger.enter('step')
      self._metrics.start(step)  # do not count the compilation
      self._recent = [values]
    else:
      self._pace.dispatched(self._times, values)
    self._run.ledger.keep_alive()

  def settle(self) -> dict[str, float]:
    """The ledger's {part: seconds} at the end of the dispatched steps."""
    steps = self._pace.take()
    waited = sum(step.data for step in steps)
    self._run.ledger.move(waited, 'step', 'data_wait')
    self._paced += steps
    return self._run.ledger.read()

  def report(self, step: int, state: TrainState) -> None:
    """Evaluates, logs and samples when the config says so.

    Raises:
      NumericError: too many steps in a row were NaN or Inf, or a device
        computes wrongly.
    """
    train_cfg, spent = self._train_cfg, self._run.ledger.spent
    last = step == train_cfg.num_steps
    more = {}
    if self._heldout_loss and (last or step % train_cfg.eval_every == 0):
      self.settle()
      with spent('eval'):
        more['heldout_loss'] = self._heldout_loss(state.params)
        emas = {'ema': state.ema_params}
        emas |= {f'ema_{length}': ema for length, ema in state.emas.items()}
        for name, ema in emas.items():
          ema = self._run.program.as_params(ema)
          more[f'heldout_loss_{name}'] = self._heldout_loss(ema)
    if more or last or step % train_cfg.log_every == 0:
      self.settle()
      with spent('other'):
        self._log(step, state, more)
    every = train_cfg.check_replicas_every
    if every and step % every == 0:
      self.settle()
      with spent('other'):
        replicas.check(state, self._experiment.mesh, step)
    if self._preview and (last or step % train_cfg.sample_every == 0):
      self.settle()
      with spent('eval'):
        ema = self._run.program.as_params(state.ema_params)
        self._keep(step, self._preview(ema))

  def _log(self, step: int, state: TrainState, more: dict) -> None:
    """Writes a line of metrics; ends a run of bad steps."""
    source = self._experiment.source('train')
    more['bad_samples'] = len(source.bad)
    batch_size = self._train_cfg.batch_size
    self._metrics.log(step, batch_size, self._recent, self._paced, **more)
    self._recent, self._paced = [], []
    limit = self._train_cfg.max_bad_steps
    check_finite(state, step, limit, self._seen, source, self._run.workdir)

  def _keep(self, step: int, sample: Preview | None) -> None:
    """Writes a preview, an image or text; it is None off process 0."""
    path = self._run.workdir / 'samples' / f'step_{step:07d}'
    if isinstance(sample, np.ndarray):
      image_io.save_png(path.with_suffix('.png'), sample)
      self._metrics.image(step, sample)
    elif sample is not None:
      files.make_folder(path.parent)
      files.write_text(path.with_suffix('.txt'), sample + '\n')


def _metrics(run: Run) -> Metrics:
  """The `Metrics` of a run; process 0 writes."""
  config, mesh = run.program.experiment.config, run.program.mesh
  loggers: list[Logger] = []
  first_process = jax.process_index() == 0
  if first_process:
    loggers = [
      logger(run.workdir, config.to_dict(), run.start)
      for logger in find_loggers(config.train.log_to)
    ]
  return Metrics(
    run.workdir / 'metrics.jsonl',
    run.ledger,
    start_step=run.start,
    num_steps=config.train.num_steps,
    write=first_process,
    devices=mesh.size,
    flops=run.program.flops,
    model_flops=run.program.model_flops if first_process else 0.0,
    spared=run.program.spared_flops if first_process else (),
    peak=chips.find_peak(mesh.devices.flat[0].device_kind),
    loggers=loggers,
  )
