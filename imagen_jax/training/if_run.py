"""Fine-tuning of a DeepFloyd IF stage, whole or by low-rank adapters."""

import functools
import itertools
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imagen_jax import hub_folder, sharding
from imagen_jax.checkpoint import Checkpoints
from imagen_jax.data.pipeline import batches
from imagen_jax.data.sources import make_source
from imagen_jax.deepfloyd import cleaning, lora, loss, schedule, text, weights
from imagen_jax.deepfloyd import stage as stages
from imagen_jax.deepfloyd.images import enlarge
from imagen_jax.deepfloyd.unet import IFUNet
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import NumericError, UsageError
from imagen_jax.stage import box_downsample
from imagen_jax.training import workdir as workdirs
from imagen_jax.training.metrics import Metrics
from imagen_jax.training.state import (
  TrainState,
  ema_decay,
  init_state,
  make_optimizer,
)
from imagen_jax.training.step import NUM_BANDS


def finetune(config, workdir, *, should_stop=lambda step: False):
  """Trains until `config.train.num_steps`, or resumes and does, and exports.

  Args:
    config: see `configs/if_finetune.py`.
    workdir: its directory: `config.json`, `checkpoints/`, `metrics.jsonl`,
      `text/` (embeddings) and, at the end, `export/` with a stage's folder
      that `sample.py` and diffusers load.
    should_stop: asked after every step; True saves and returns early.

  Returns:
    the number of steps taken in all.

  Raises:
    UsageError, ModelError: the config or the model cannot be used.
    NumericError: too many steps in a row were NaN or Inf.
  """
  workdir, every = pathlib.Path(workdir), config.train
  stage = stages.read(config.model)
  adapt = _choice(config, 'method', ('lora', 'full')) == 'lora'
  drop = _choice(config, 'variance', ('keep', 'drop')) == 'drop'
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  sharding.check_batch_size(every.batch_size, mesh)
  dtype = resolve_dtype(config.dtype)
  module, frozen = stage.load(
    dtype=dtype,
    weights_dtype=dtype if adapt else jnp.float32,
    place=functools.partial(sharding.leaf_sharding, mesh=mesh),
  )
  if drop:
    module, frozen = without_variance(module, frozen)

  source = make_source(
    **config.data.to_dict(), size=stage.resolution, split='train'
  )
  clean = cleaning.cleaner(config.text.clean)
  captions = (clean(source[i]['caption']) for i in range(len(source)))
  unique = list(dict.fromkeys(['', *captions]))
  embedded = text.embed(
    unique,
    text.find([config.text.path or config.model]),
    dtype=config.text.dtype,
    cache=workdir / 'text',
  )
  lookup = dict(zip(unique, embedded))
  encoder = types.SimpleNamespace(dim=embedded.shape[-1], digest=None)
  workdirs.claim(workdir, config, encoder, write=jax.process_index() == 0)

  # ---- State -------------------------------------------------------------
  tx = make_optimizer(every)
  key = jax.random.key(config.seed)

  def fresh(params):
    trained = lora.init(key, params, config.rank) if adapt else params
    return init_state(trained, tx)

  abstract = jax.eval_shape(fresh, frozen)
  placed = sharding.state_shardings(abstract, mesh)
  checkpoints = Checkpoints(workdir / 'checkpoints', keep_last=every.keep_last)
  if checkpoints.latest_step() is None:
    state, start = jax.jit(fresh, out_shardings=placed)(frozen), 0
  else:
    state, _, start = checkpoints.restore(
      sharding.with_shardings(abstract, placed)
    )
  frozen = frozen if adapt else {}

  def assemble(trained, frozen):
    if not adapt:
      return trained
    return lora.merge(frozen, trained, config.scale)

  step_fn = jax.jit(
    functools.partial(
      train_step,
      assemble=assemble,
      module=module,
      stage=stage,
      tx=tx,
      seed=config.seed,
      ema_limit=every.ema_decay,
      weight=0.0 if drop else config.bound_weight,
    ),
    donate_argnums=0,
    out_shardings=(placed, sharding.replicated(mesh)),
  )

  # ---- Steps -------------------------------------------------------------
  def numbers(example):
    return {
      'image': example['image'],
      'text': lookup[clean(example['caption'])],
    }

  data = batches(
    source,
    seed=config.seed,
    batch_size=every.batch_size,
    start_step=start,
    host=jax.process_index(),
    num_hosts=jax.process_count(),
    transform=numbers,
  )
  metrics = Metrics(
    workdir / 'metrics.jsonl',
    start_step=start,
    num_steps=every.num_steps,
    write=jax.process_index() == 0,
    devices=mesh.size,
  )
  step, recent = start, []
  with checkpoints, metrics, jax.set_mesh(mesh):
    for step in itertools.count(start + 1):
      if step > every.num_steps:
        step = every.num_steps
        break
      batch = next(data)
      batch = sharding.put_batch(
        {'image': batch['image'], 'text': batch['text']}, mesh
      )
      state, values = step_fn(state, batch, lookup[''], frozen)
      recent.append(values)
      stopping = should_stop(step)
      if step % every.log_every == 0 or step == every.num_steps:
        metrics.log(step, every.batch_size, recent)
        recent = []
        if int(state.skipped_in_row) >= every.max_bad_steps:
          raise NumericError(
            f'the last {int(state.skipped_in_row)} steps up to step {step} '
            'gave NaN or Inf and were left out; resume with a lower '
            'train.optimizer.learning_rate.'
          )
      last = step == every.num_steps or stopping
      if last or step % every.checkpoint_every == 0:
        checkpoints.save(step, state, {'data_step': step})
      if stopping:
        break
    if step == every.num_steps and jax.process_index() == 0:
      params = assemble(state.ema_params, frozen)
      export(workdir / 'export' / stage.name, params, stage, drop)
  return step


def train_step(
  state,
  batch,
  empty,
  frozen,
  *,
  assemble,
  module,
  stage,
  tx,
  seed,
  ema_limit,
  weight,
):
  """One step; a step with NaN or Inf changes nothing but the counters.

  Args:
    state: `TrainState`, of the network's parameters or of the adapters.
    batch: `image` uint8 [B, R, R, 3], `text` [B, L, D].
    empty: [L, D], the empty prompt, which replaces a tenth of the captions.
    frozen: the parameters that are not trained.
    assemble: (trained, frozen) -> the network's parameters.
    module, stage: the network and what its folder says.
    tx: the optimizer.
    seed: of the steps' keys.
    ema_limit: the EMA's decay after its warm-up.
    weight: of the variance's bound, see `loss.hybrid_loss`.

  Returns:
    (state, metrics), as `step.train_step`.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  keys = dict(zip(('drop', 'level', 'low', 'loss'), jax.random.split(key, 4)))
  x = batch['image'].astype(jnp.float32) / 127.5 - 1
  dropped = jax.random.bernoulli(keys['drop'], 0.1, x.shape[:1])
  captions = jnp.where(dropped[:, None, None], empty, batch['text'])
  low = level = None
  if stage.enlarges:
    low = enlarge(box_downsample(x, x.shape[1] // 4), *x.shape[1:3])
    level = jax.random.randint(
      keys['level'], x.shape[:1], 0, stage.noising.num_train_timesteps
    )
    abar = schedule.alphas_cumprod(stage.noising).astype(np.float32)
    abar = jnp.asarray(abar)[level][:, None, None, None]
    noise = jax.random.normal(keys['low'], low.shape)
    low = jnp.sqrt(abar) * low + jnp.sqrt(1 - abar) * noise
  plan = loss.training_plan(stage.schedule)

  def loss_fn(trained):
    def predict(z, t):
      given = z if low is None else jnp.concatenate([z, low], axis=-1)
      params = assemble(trained, frozen)
      return module.apply({'params': params}, given, t, captions, level)

    values, details = loss.hybrid_loss(
      keys['loss'], predict, x, plan, weight=weight
    )
    band = jnp.floor(details['t'] * NUM_BANDS).astype(jnp.int32)
    here = jax.nn.one_hot(band, NUM_BANDS)
    bands = {'band_loss': values @ here, 'band_count': here.sum(axis=0)}
    return jnp.mean(values), bands

  (value, bands), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params
  )
  grad_norm = optax.tree.norm(grads)
  good = jnp.isfinite(value) & jnp.isfinite(grad_norm)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  decay = ema_decay(state.step, ema_limit)
  ema = optax.incremental_update(params, state.ema_params, 1 - decay)
  keep = lambda new, old: jax.tree.map(
    lambda n, o: jnp.where(good, n, o), new, old
  )
  bad = jnp.logical_not(good).astype(jnp.int32)
  state = TrainState(
    step=state.step + 1,
    params=keep(params, state.params),
    ema_params=keep(ema, state.ema_params),
    opt_state=keep(opt_state, state.opt_state),
    skipped=state.skipped + bad,
    skipped_in_row=(state.skipped_in_row + 1) * bad,
  )
  metrics = {
    'loss': value,
    'grad_norm': grad_norm,
    'param_norm': optax.tree.norm(state.params),
    'skipped': state.skipped,
    **bands,
  }
  return state, metrics


def without_variance(module, params):
  """The network without the channels that say the variance."""
  config = types.SimpleNamespace(**vars(module.config))
  config.out_channels = 3
  last = {k: v[..., :3] for k, v in params['conv_out'].items()}
  module = IFUNet(type(module.config)(**vars(config)), module.dtype)
  return module, params | {'conv_out': last}


def export(folder, params, stage, drop):
  """A stage's folder with new weights, as diffusers has it."""
  raw = hub_folder.read_json(stage.folder / 'unet' / 'config.json', '')
  if folder.exists():  # of a run that went on
    shutil.rmtree(folder)
  weights.save(
    folder / 'unet', params, source=raw | ({'out_channels': 3} if drop else {})
  )
  for name in ('scheduler', 'image_noising_scheduler'):
    if (stage.folder / name).is_dir():
      shutil.copytree(stage.folder / name, folder / name)
  if (stage.folder / 'model_index.json').exists():
    shutil.copy(stage.folder / 'model_index.json', folder)
  if drop:
    path = folder / 'scheduler' / 'scheduler_config.json'
    made = hub_folder.read_json(path, '') | {'variance_type': 'fixed_small'}
    path.write_text(json.dumps(made, indent=2) + '\n', encoding='utf-8')


def _choice(config, key, allowed):
  if config[key] not in allowed:
    raise UsageError(
      f'{key} is {config[key]!r}; it can be {" or ".join(allowed)}.'
    )
  return config[key]
