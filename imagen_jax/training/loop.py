"""The training of one stage, top to bottom: build, restore, step, save."""

import collections
import itertools
import pathlib
import time

import jax

from imagen_jax import sharding
from imagen_jax.data.sources import list_skipped
from imagen_jax.io import images as image_io
from imagen_jax.io import model_folder
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.training import workdir as workdirs
from imagen_jax.training.guard import check_finite
from imagen_jax.training.heldout import make_heldout_loss
from imagen_jax.training.loggers import make_loggers
from imagen_jax.training.metrics import Metrics
from imagen_jax.training.profiling import Profiler
from imagen_jax.training.run import split_index
from imagen_jax.training.stage_run import StageRun
from imagen_jax.training.watchdog import Watchdog

HANG_SECONDS = 1800.0


def train(
  config,
  workdir,
  *,
  should_stop=lambda step: False,
  init_from=None,
  force=False,
  dry_run=False,
  count_flops=None,
  peak=None,
):
  """Trains until `config.train.num_steps`, or resumes and does.

  Args:
    config: a stage's ConfigDict, such as `configs/shapes_base.py`'s, or one
      of IF's, `configs/if_finetune.py`.
    workdir: its directory: `config.json`, `checkpoints/`, `metrics.jsonl`,
      `samples/`. When it holds a run of the same config, that run continues.
    should_stop: asked after every step, with its number; True saves and
      returns early. All processes must get the same answer.
    init_from: a training workdir or an exported stage whose EMA a new run
      starts from; a run that continues has no use for it.
    force: continue although the config or the data set has changed.
    dry_run: print what would run, write nothing, and return.
    count_flops: function of the traced step that counts its FLOPs.
    peak: FLOPs per second of one device, for the MFU; None: unknown.

  Returns:
    the number of steps taken in all.

  Raises:
    UsageError: the config is wrong, or is not the workdir's.
    ModelError: the text encoder or every checkpoint is unusable.
    NumericError: too many steps in a row were NaN or Inf.
  """
  workdir = pathlib.Path(workdir)
  first_process = jax.process_index() == 0
  every = config.train

  # ---- What is trained, on what ------------------------------------------
  run = make_run(config, count_flops)
  if first_process:
    for line in run.describe(arrays=dry_run):
      print(line, flush=True)
  if dry_run:
    return 0
  warm, warm_record = None, None
  if init_from is not None:
    warm = model_folder.load_stage(init_from)
    digest = model_folder.weights_digest(warm)
    warm_record = {'path': str(init_from), 'digest': digest}
  workdirs.claim(
    workdir,
    config,
    run.text,
    fingerprint=run.source.fingerprint,
    init_from=warm_record,
    force=force,
    write=first_process,
  )
  if first_process:
    list_skipped(run.source, workdir / 'bad_samples.jsonl')
  run.open(workdir)

  # ---- State -------------------------------------------------------------
  checkpoints = Checkpoints(
    every.get('checkpoint_dir') or workdir / 'checkpoints',
    keep_last=every.keep_last,
    keep_every=every.get('keep_every'),
  )
  start = 0
  if checkpoints.latest_step() is not None:
    state, _, start = checkpoints.restore(
      sharding.with_shardings(run.abstract, run.shardings)
    )
    came_from = f'resumes after step {start}'
  else:
    state, came_from = run.first_state(warm)
  if first_process:
    print(f'{run.name}: {came_from}', flush=True)

  # ---- Data, and monitoring -------------------------------------------
  data = run.train_stream(start)
  preview = run.make_preview() if every.sample_every else None
  heldout_loss = None
  if every.get('eval_every') and run.holds_out():
    heldout_loss = make_heldout_loss(run)
  metrics = Metrics(
    workdir / 'metrics.jsonl',
    start_step=start,
    num_steps=every.num_steps,
    write=first_process,
    devices=run.mesh.size,
    flops=run.flops,
    peak=peak,
    loggers=make_loggers(
      every.get('log_to'), workdir, config.to_dict(), start_step=start
    )
    if first_process
    else (),
  )
  step, recent = start, []
  seen = collections.deque(maxlen=every.max_bad_steps)
  alive = Watchdog(every.get('hang_seconds', HANG_SECONDS))
  profiler = Profiler(every.get('profile_at'), workdir / 'profile')
  with checkpoints, metrics, alive, profiler, jax.set_mesh(run.mesh):
    for step in itertools.count(start + 1):
      if step > every.num_steps:
        step = every.num_steps
        break
      profiler.before(step)
      waiting = time.perf_counter()
      batch, index = split_index(next(data))
      metrics.waited(time.perf_counter() - waiting)
      seen.append((step, index))
      batch = sharding.put_batch(batch, run.mesh)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, values = run.step_fn(state, batch, run.frozen)
      recent.append(values)
      profiler.after(step, state)
      if step == start + 1:
        jax.block_until_ready(state)
        metrics.start(step)  # compiling is not training
        recent = recent[-1:]
      stopping = should_stop(step)
      alive.beat(step)
      last = step == every.num_steps
      more = {}
      if heldout_loss and (last or step % every.eval_every == 0):
        metrics.pause()
        more['heldout_loss'] = heldout_loss(state.params)
        more['heldout_loss_ema'] = heldout_loss(state.ema_params)
        metrics.resume()
      if more or last or step % every.log_every == 0:
        bad = len(run.source.bad)
        metrics.log(step, every.batch_size, recent, bad_samples=bad, **more)
        recent = []
        check_finite(
          state, step, every.max_bad_steps, seen, run.source, workdir
        )
      if preview and (last or step % every.sample_every == 0):
        metrics.pause()
        grid = preview(state.ema_params)
        if grid is not None:
          image_io.save_png(workdir / f'samples/step_{step:07d}.png', grid)
          metrics.image(step, grid)
        metrics.resume()
      if last or stopping or step % every.checkpoint_every == 0:
        checkpoints.save(step, state, {'data_step': step})
      if stopping:
        break
    if step == every.num_steps:
      run.finish(state, workdir)
  return step


def make_run(config, count_flops=None):
  """The `Run` of a config."""
  if config.get('kind') == 'if_finetune':
    from imagen_jax.deepfloyd.experiment import IFRun

    return IFRun(config, count_flops)
  return StageRun(config, count_flops)
