"""The training of one stage, top to bottom: build, restore, step, save."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import pictures, sharding
from imagen_jax import stage as stages
from imagen_jax.checkpoint import Checkpoints
from imagen_jax.data.pipeline import batches, flip
from imagen_jax.data.sources import list_skipped, make_source
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import NumericError
from imagen_jax.model_folder import text_folder
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.training import workdir as workdirs
from imagen_jax.training.metrics import Metrics
from imagen_jax.training.state import init_state, make_optimizer
from imagen_jax.training.step import jit_step

NUM_PREVIEWS = 8


def train(config, workdir, *, should_stop=lambda: False):
  """Trains until `config.train.num_steps`, or resumes and does.

  Args:
    config: a stage's ConfigDict, such as `configs/shapes_base.py`'s.
    workdir: its directory: `config.json`, `checkpoints/`, `metrics.jsonl`,
      `samples/`. When it holds a run of the same config, that run goes on.
    should_stop: asked after every step; True saves and returns early.

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

  # ---- Text encoder, stage, mesh -----------------------------------------
  dtype = resolve_dtype(config.dtype)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  sharding.check_batch_size(every.batch_size, mesh, every.get('accumulate', 1))
  encoder = load_text_encoder(
    text_folder(config.text.path),
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
  workdirs.claim(workdir, config, encoder, write=first_process)
  if first_process:
    list_skipped(source, workdir / 'bad_samples.jsonl')

  # ---- State -------------------------------------------------------------
  tx = make_optimizer(every)

  def fresh(key):
    return init_state(stages.init_params(stage, key), tx)

  key = jax.random.key(config.seed)
  abstract = jax.eval_shape(fresh, key)
  placed = sharding.state_shardings(abstract, mesh)
  checkpoints = Checkpoints(
    workdir / 'checkpoints',
    keep_last=every.keep_last,
    keep_every=every.keep_every,
  )
  if checkpoints.latest_step() is None:
    state, start = jax.jit(fresh, out_shardings=placed)(key), 0
  else:
    state, _, start = checkpoints.restore(
      sharding.with_shardings(abstract, placed)
    )
  if first_process:
    count = stages.num_params(abstract.params)
    print(
      f'{stage.name}: {count / 1e6:.2f} M parameters, '
      f'{mesh.size} {jax.devices()[0].platform} device(s), '
      f'{"step " + str(start) if start else "from scratch"}',
      flush=True,
    )

  # ---- Data --------------------------------------------------------------
  def tokenize(example):
    ids, mask, _ = encoder.tokenize(
      [example['caption']], max_len=config.text.max_len
    )
    return {'image': example['image'], 'ids': ids[0], 'mask': mask[0]}

  def embedded(example):
    return {key: example[key] for key in ('image', 'text', 'mask')}

  data = batches(
    source,
    seed=config.seed,
    batch_size=every.batch_size,
    start_step=start,
    host=jax.process_index(),
    num_hosts=jax.process_count(),
    augment=flip if config.data.get('flip') else None,
    transform=embedded if prepared else tokenize,
  )

  # ---- Steps -------------------------------------------------------------
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
  text_params = {}
  if not prepared:
    text_params = jax.device_put(
      encoder.params, sharding.state_shardings(encoder.params, mesh)
    )
  preview = _previewer(config, stage, encoder, workdir)
  metrics = Metrics(
    workdir / 'metrics.jsonl',
    start_step=start,
    num_steps=every.num_steps,
    write=first_process,
  )
  step, recent = start, []
  with checkpoints, jax.set_mesh(mesh):
    for step in itertools.count(start + 1):
      if step > every.num_steps:
        step = every.num_steps
        break
      batch = sharding.put_batch(next(data), mesh)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, values = step_fn(state, batch, text_params)
      recent.append(values)
      if step == start + 1:
        jax.block_until_ready(state)
        metrics.start(step)  # compiling is not training
        recent = recent[-1:]
      stopping = should_stop()
      if step % every.log_every == 0 or step == every.num_steps:
        _log(metrics, step, recent, every)
        recent = []
        _check_finite(state, step, every.max_bad_steps)
      if step % every.sample_every == 0 or step == every.num_steps:
        if first_process:
          preview(state.ema_params, step)
        metrics.pause()
      if (
        step % every.checkpoint_every == 0
        or step == every.num_steps
        or stopping
      ):
        checkpoints.save(step, state, {'data_step': step})
      if stopping:
        break
  return step


def _source(config, stage, split):
  data = config.data.to_dict()
  data.pop('flip', None)  # the pipeline's business
  return make_source(**data, size=stage.resolution, split=split)


def _log(metrics, step, recent, every):
  recent = jax.device_get(recent)
  metrics.log(
    step,
    every.batch_size,
    loss=float(np.mean([m['loss'] for m in recent])),
    grad_norm=float(np.mean([m['grad_norm'] for m in recent])),
    skipped=int(recent[-1]['skipped']),
  )


def _check_finite(state, step, limit):
  bad = int(state.skipped_in_row)
  if bad >= limit:
    raise NumericError(
      f'the last {bad} steps up to step {step} gave NaN or Inf and were left '
      'out; the parameters are those from before: resume from the last '
      'checkpoint with a lower train.optimizer.learning_rate.'
    )


def _previewer(config, stage, encoder, workdir):
  """A function that draws a few pictures with the EMA parameters.

  The written grid has a row of reference pictures, for a super-resolution
  stage a row of what it was given, and a row of what the stage drew.
  """
  source = _source(config, stage, 'eval')
  examples = [source[i] for i in range(min(NUM_PREVIEWS, len(source)))]
  truth = np.stack([example['image'] for example in examples])
  text, mask = encoder.encode(
    [example['caption'] for example in examples],
    max_len=config.text.max_len,
  )
  low = None
  if stage.low_resolution is not None:
    x = jnp.asarray(truth, jnp.float32) / 127.5 - 1
    low = stages.box_downsample(x, stage.low_resolution)
  keys = jax.random.split(jax.random.key(config.seed), len(examples))
  settings = stage.sampling
  draw = jax.jit(
    lambda params: stages.sample(
      stage,
      params,
      keys,
      text,
      mask,
      low,
      settings.guidance,
      settings.aug_level,
      settings=settings,
    )
  )

  def preview(ema_params, step):
    rows = [truth]
    if low is not None:
      factor = stage.resolution // stage.low_resolution
      small = stages.to_uint8(low)
      rows.append(small.repeat(factor, axis=1).repeat(factor, axis=2))
    rows.append(stages.to_uint8(draw(ema_params)))
    images = pictures.enlarge(np.concatenate(rows), 64)
    path = workdir / 'samples' / f'step_{step:07d}.png'
    pictures.save_png(path, pictures.grid(images, len(examples)))

  return preview
