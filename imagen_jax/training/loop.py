"""The training of one stage, top to bottom: build, restore, step, save."""

import collections
import functools
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import model_folder, pictures, sharding
from imagen_jax import stage as stages
from imagen_jax.checkpoint import Checkpoints
from imagen_jax.data.pipeline import batches, flip
from imagen_jax.data.sources import list_skipped, make_source
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import ModelError, NumericError
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.training import heldout, report
from imagen_jax.training import workdir as workdirs
from imagen_jax.training.loggers import make_loggers
from imagen_jax.training.metrics import Metrics
from imagen_jax.training.preview import make_preview
from imagen_jax.training.profiling import Profiler
from imagen_jax.training.state import init_state, make_optimizer
from imagen_jax.training.step import jit_step
from imagen_jax.training.watchdog import Watchdog

HANG_SECONDS = 1800.0


def train(
  config,
  workdir,
  *,
  should_stop=lambda step: False,
  init_from=None,
  insist=False,
  dry_run=False,
  count_flops=None,
  peak=None,
):
  """Trains until `config.train.num_steps`, or resumes and does.

  Args:
    config: a stage's ConfigDict, such as `configs/shapes_base.py`'s.
    workdir: its directory: `config.json`, `checkpoints/`, `metrics.jsonl`,
      `samples/`. When it holds a run of the same config, that run goes on.
    should_stop: asked after every step, with its number; True saves and
      returns early. All processes must get the same answer.
    init_from: a training workdir or an exported stage whose EMA a new run
      starts from; a run that goes on has no use for it.
    insist: go on although the config or the data set has changed.
    dry_run: print what would run, write nothing, and return.
    count_flops: function of the traced step that counts its operations.
    peak: operations per second of one device, for the MFU; None: unknown.

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

  # ---- Text encoder, stage, mesh, data -----------------------------------
  dtype = resolve_dtype(config.dtype)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  sharding.check_batch_size(every.batch_size, mesh, every.get('accumulate', 1))
  encoder = load_text_encoder(
    model_folder.text_folder(config.text.path),
    config.text.get('dtype', 'float32'),
    # Split like the state: T5-XXL does not fit beside it on one device.
    place=functools.partial(sharding.leaf_sharding, mesh=mesh)
    if mesh.shape['fsdp'] > 1
    else None,
  )
  stage = stages.from_config(
    config.stage.to_dict(),
    text_dim=encoder.dim,
    text_len=config.text.max_len,
    dtype=dtype,
  )
  source = _source(config, stage, 'train')
  prepared = getattr(source, 'header', {}).get('text') is not None
  if prepared:
    source.check_text(
      encoder=encoder.digest,
      tokenizer=encoder.tokenizer.digest,
      max_len=config.text.max_len,
    )

  # ---- State -------------------------------------------------------------
  tx = make_optimizer(every)

  def fresh(key):
    return init_state(stages.init_params(stage, key), tx)

  key = jax.random.key(config.seed)
  stages.param_shapes(stage)  # or a sentence on stage.net
  abstract = jax.eval_shape(fresh, key)
  placed = sharding.state_shardings(abstract, mesh)
  text_params, text_placed = {}, {}
  if not prepared:
    text_placed = sharding.state_shardings(encoder.params, mesh)
    text_params = jax.device_put(encoder.params, text_placed)
  step_fn = jit_step(
    mesh,
    placed,
    stage=stage,
    text_module=encoder.module,
    tx=tx,
    seed=config.seed,
    ema_limit=every.ema_decay,
    accumulate=every.get('accumulate', 1),
  )
  flops = None
  if count_flops is not None:
    shapes = _batch_shapes(config, stage, prepared)
    with jax.set_mesh(mesh):
      flops = count_flops(step_fn.trace(abstract, shapes, text_params).jaxpr)
  if first_process:
    for line in report.startup(
      stage,
      mesh,
      abstract,
      placed,
      (text_params, text_placed),
      batch_size=every.batch_size,
      flops=flops,
    ):
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
    encoder,
    fingerprint=getattr(source, 'fingerprint', None),
    init_from=warm_record,
    insist=insist,
    write=first_process,
  )
  if first_process:
    list_skipped(source, workdir / 'bad_samples.jsonl')
  checkpoints = Checkpoints(
    every.get('checkpoint_dir') or workdir / 'checkpoints',
    keep_last=every.keep_last,
    keep_every=every.keep_every,
  )
  start, came_from = 0, 'from scratch'
  if checkpoints.latest_step() is not None:
    state, _, start = checkpoints.restore(
      sharding.with_shardings(abstract, placed)
    )
    came_from = f'goes on after step {start}'
  elif warm is not None:
    params = _warm_params(warm, abstract.params)
    state = jax.jit(functools.partial(init_state, tx=tx), out_shardings=placed)(
      params
    )
    came_from = f'starts from the weights of {init_from}'
  else:
    state = jax.jit(fresh, out_shardings=placed)(key)
  if first_process:
    print(f'{stage.name}: {came_from}', flush=True)

  # ---- Data --------------------------------------------------------------
  def tokenize(example):
    ids, mask, _ = encoder.tokenize(
      [example['caption']], max_len=config.text.max_len
    )
    return {'image': example['image'], 'ids': ids[0], 'mask': mask[0]}

  def embedded(example):
    return {key: example[key] for key in ('image', 'text', 'mask')}

  def stream(source, **options):
    return batches(
      source,
      seed=config.seed,
      batch_size=every.batch_size,
      host=jax.process_index(),
      num_hosts=jax.process_count(),
      transform=embedded if prepared else tokenize,
      **options,
    )

  data = stream(
    source,
    start_step=start,
    augment=flip if config.data.get('flip') else None,
  )
  unseen = _source(config, stage, 'eval')
  preview = make_preview(
    stage,
    encoder,
    unseen,
    mesh,
    seed=config.seed,
    max_len=config.text.max_len,
  )
  heldout_loss = None
  if every.get('eval_every') and _held_out(config):
    some = itertools.islice(stream(unseen), heldout.NUM_BATCHES)
    heldout_loss = heldout.make_heldout_loss(
      stage,
      encoder.module,
      [_numbers(batch)[0] for batch in some],
      mesh,
      seed=config.seed,
    )

  # ---- Steps -------------------------------------------------------------
  metrics = Metrics(
    workdir / 'metrics.jsonl',
    start_step=start,
    num_steps=every.num_steps,
    write=first_process,
    devices=mesh.size,
    flops=flops,
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
  with checkpoints, metrics, alive, profiler, jax.set_mesh(mesh):
    for step in itertools.count(start + 1):
      if step > every.num_steps:
        step = every.num_steps
        break
      profiler.before(step)
      waiting = time.perf_counter()
      batch, index = _numbers(next(data))
      metrics.waited(time.perf_counter() - waiting)
      seen.append((step, index))
      batch = sharding.put_batch(batch, mesh)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, values = step_fn(state, batch, text_params)
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
        more['heldout_loss'] = heldout_loss(state.params, text_params)
        more['heldout_loss_ema'] = heldout_loss(state.ema_params, text_params)
        metrics.go_on()
      if more or last or step % every.log_every == 0:
        bad = len(getattr(source, 'bad', ()))
        metrics.log(step, every.batch_size, recent, bad_samples=bad, **more)
        recent = []
        _check_finite(state, step, every.max_bad_steps, seen, source, workdir)
      if last or step % every.sample_every == 0:
        metrics.pause()
        grid = preview(state.ema_params)
        if grid is not None:
          pictures.save_png(workdir / f'samples/step_{step:07d}.png', grid)
          metrics.image(step, grid)
        metrics.go_on()
      if last or stopping or step % every.checkpoint_every == 0:
        checkpoints.save(step, state, {'data_step': step})
      if stopping:
        break
  return step


def _source(config, stage, split):
  data = config.data.to_dict()
  data.pop('flip', None)  # the pipeline's business
  eval_path = data.pop('eval_path', None)
  if split == 'eval' and eval_path:
    data['path'] = eval_path
  return make_source(**data, size=stage.resolution, split=split)


def _held_out(config):
  """Whether the eval split is not the one that is trained on."""
  data = config.data
  return data.kind in ('shapes', 'tfds') or bool(data.get('eval_path'))


def _numbers(batch):
  """(what goes to the devices, where in the source it came from)."""
  return {k: v for k, v in batch.items() if k != 'index'}, batch['index']


def _batch_shapes(config, stage, prepared):
  """The shapes of one global batch."""
  rows, side = config.train.batch_size, stage.resolution
  shape = jax.ShapeDtypeStruct
  shapes = {
    'image': shape((rows, side, side, 3), np.uint8),
    'mask': shape((rows, stage.text_len), bool),
  }
  if prepared:
    size = (rows, stage.text_len, stage.text_dim)
    return shapes | {'text': shape(size, jnp.bfloat16)}
  return shapes | {'ids': shape((rows, stage.text_len), np.int32)}


def _warm_params(record, abstract):
  """A stage's EMA, if it is of the same network."""
  params = model_folder.load_params(record)
  want, have = (
    {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (abstract, params)
  )
  for name in sorted(want.keys() | have.keys()):
    if want.get(name) != have.get(name):
      raise ModelError(
        f'--init_from {record.path} is another network: {name} is '
        f'{have.get(name, "absent")} there and {want.get(name, "absent")} '
        'here; give a stage that was trained with this stage.net.'
      )
  return params


def _check_finite(state, step, limit, seen, source, workdir):
  """Stops a run whose last `limit` steps were all left out."""
  bad = int(state.skipped_in_row)
  if bad < limit:
    return
  name = getattr(source, 'name', str)
  rows = [
    {'step': number, 'samples': [name(int(i)) for i in index]}
    for number, index in seen
  ]
  process = jax.process_index()
  file = workdir / f'bad_batches_{process}.jsonl'
  file.write_text('\n'.join(map(json.dumps, rows)) + '\n', encoding='utf-8')
  some = rows[-1]['samples']
  raise NumericError(
    f'the last {bad} steps up to step {step} gave NaN or Inf and were left '
    'out; the parameters are those from before: resume from the last '
    'checkpoint with a lower train.optimizer.learning_rate. The last batch '
    f'held {", ".join(some[:4])}{", …" if len(some) > 4 else ""}; {file} lists '
    'all of them.'
  )
