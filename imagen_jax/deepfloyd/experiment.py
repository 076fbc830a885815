"""A DeepFloyd IF stage, fine-tuned whole or by low-rank adapters."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax.cascade.conditioning import box_downsample
from imagen_jax.deepfloyd import (
  cleaning,
  lora,
  loss,
  pipeline,
  schedule,
  text,
)
from imagen_jax.deepfloyd import stage as stages
from imagen_jax.deepfloyd import weights as weight_files
from imagen_jax.deepfloyd.export import (
  cut_variance,
  export_stage,
  without_variance,
)
from imagen_jax.deepfloyd.images import upsample
from imagen_jax.deepfloyd.unet import IFUNet
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import UsageError
from imagen_jax.training.preview import make_preview
from imagen_jax.training.run import Run, image_shape
from imagen_jax.training.state import init_state
from imagen_jax.training.step import take_step

DROP = 0.1  # of the captions, for the guidance


class IFRun(Run):
  """A `Run` of a config such as `configs/if_finetune.py`.

  Besides what every run leaves, its workdir holds `text/` (embeddings) and, at
  the end, `export/` with a stage's folder that `sample.py` and diffusers load.

  Attributes:
    stage: the stage's folder, read.
    module: its network, without the variance if that is dropped.
    frozen: the empty prompt's embedding, and the weights if adapters are
      trained.

  Raises:
    UsageError: the config is wrong.
    ModelError: the model or its text encoder is unusable.
    DataError: the images are.
  """

  frozen_name = 'frozen weights'

  def __init__(self, config, count_flops=None):
    self.stage = stages.read(config.model)
    self.adapt = _choice(config, 'method', ('lora', 'full')) == 'lora'
    self.drop = _choice(config, 'variance', ('keep', 'drop')) == 'drop'
    self.clean = cleaning.cleaner(config.text.clean)
    super().__init__(
      config, name=self.stage.name, resolution=self.stage.resolution
    )
    self.text_folder = text.find([config.text.path or config.model])
    self.text = types.SimpleNamespace(
      dim=self.stage.config.encoder_hid_dim, digest=None
    )
    self.dtype = resolve_dtype(config.dtype)
    self.module = IFUNet(self.stage.config, self.dtype)
    shapes = weight_files.abstract_params(self.stage.config)
    if self.drop:
      self.module = without_variance(self.module)
      shapes = jax.eval_shape(cut_variance, shapes)
    shape = jax.ShapeDtypeStruct
    size = (text.MAX_LEN, self.text.dim)
    self.frozen = {'empty': shape(size, jnp.float32)}
    if self.adapt:
      self.frozen['weights'] = jax.tree.map(
        lambda leaf: shape(leaf.shape, self.dtype), shapes
      )
    batch = {
      'image': image_shape(self),
      'text': shape((config.train.batch_size, *size), jnp.float32),
    }
    self.settle(shapes, count_flops, self._jit_step, batch)

  def _jit_step(self, shardings):
    return jax.jit(
      functools.partial(
        train_step,
        loss_fn=self._loss,
        tx=self.tx,
        seed=self.config.seed,
        ema_limit=self.config.train.ema_decay,
        accumulate=self.accumulate,
      ),
      donate_argnums=0,
      out_shardings=(shardings, sharding.replicated(self.mesh)),
    )

  def new_state(self, trained):
    if self.adapt:
      trained = lora.init(self.key, trained, self.config.rank)
    return init_state(trained, self.tx)

  def open(self, workdir):
    self.cache = workdir / 'text'
    sources = [self.source, self.images('eval')]
    captions = (
      self.clean(source[i]['caption'])
      for source in sources
      for i in range(len(source))
    )
    text.store(
      dict.fromkeys(['', *captions]),
      self.text_folder,
      dtype=self.config.text.dtype,
      cache=self.cache,
    )
    self.frozen['empty'] = jax.device_put(
      self._embedding(''), sharding.replicated(self.mesh)
    )
    self.load_frozen()

  def load_frozen(self):
    """Reads the weights that adapters are added to."""
    if self.adapt:
      self.frozen['weights'] = self.load()

  def load(self):
    """The weights that are fine-tuned, on the mesh."""
    _, params = self.stage.load(
      dtype=self.dtype,
      weights_dtype=self.dtype if self.adapt else jnp.float32,
      place=functools.partial(sharding.leaf_sharding, mesh=self.mesh),
    )
    return cut_variance(params) if self.drop else params

  def _embedding(self, caption):
    return text.stored(
      self.clean(caption),
      self.text_folder,
      dtype=self.config.text.dtype,
      cache=self.cache,
    )

  def example(self, example):
    return {
      'image': example['image'],
      'text': self._embedding(example['caption']),
    }

  def first_state(self, init_from):
    if init_from is not None:
      raise UsageError(
        '--init_from is for stages of our own; a fine-tuning starts from '
        '--config.model.'
      )
    params = self.frozen['weights'] if self.adapt else self.load()
    state = jax.jit(self.new_state, out_shardings=self.shardings)(params)
    return state, f'starts from {self.stage.folder}'

  def assemble(self, trained, weights):
    """The network's parameters; `weights` are those adapters are added to."""
    if not self.adapt:
      return trained
    return lora.merge(weights, trained, self.config.scale)

  def _loss(self, trained, key, image, captions, frozen):
    """([B] losses, [B] times)."""
    keys = dict(zip(('drop', 'level', 'low', 'loss'), jax.random.split(key, 4)))
    stage = self.stage
    x = image.astype(jnp.float32) / 127.5 - 1
    dropped = jax.random.bernoulli(keys['drop'], DROP, x.shape[:1])
    captions = jnp.where(dropped[:, None, None], frozen['empty'], captions)
    low = level = None
    if stage.upsamples:
      low = upsample(box_downsample(x, x.shape[1] // 4), *x.shape[1:3])
      level = jax.random.randint(
        keys['level'], x.shape[:1], 0, stage.noising.num_train_timesteps
      )
      abar = schedule.alphas_cumprod(stage.noising).astype(np.float32)
      abar = jnp.asarray(abar)[level][:, None, None, None]
      noise = jax.random.normal(keys['low'], low.shape)
      low = jnp.sqrt(abar) * low + jnp.sqrt(1 - abar) * noise
    params = self.assemble(trained, frozen.get('weights'))

    def predict(z, t):
      given = z if low is None else jnp.concatenate([z, low], axis=-1)
      return self.module.apply({'params': params}, given, t, captions, level)

    values, details = loss.hybrid_loss(
      keys['loss'],
      predict,
      x,
      loss.training_plan(stage.schedule),
      weight=0.0 if self.drop else self.config.bound_weight,
    )
    return values, details['t']

  def loss(self, params, key, batch, frozen):
    return self._loss(params, key, batch['image'], batch['text'], frozen)[0]

  def make_preview(self):
    shape = (self.resolution, self.resolution, 3)
    generate = pipeline.previewer(self.stage, self.module, shape)

    def generate_trained(trained, given, frozen):
      params = self.assemble(trained, frozen.get('weights'))
      return generate(params, given, frozen['empty'])

    low = self.resolution // 4 if self.stage.upsamples else None
    return make_preview(self, jax.jit(generate_trained), low)

  def captions(self, captions):
    return {'text': np.stack([self._embedding(c) for c in captions])}

  def finish(self, state, workdir):
    self.export(state.ema_params, workdir / 'export' / self.name)

  def export(self, trained, folder):
    """Writes a stage's folder with the weights as trained."""
    weights = self.frozen['weights'] if self.adapt else None
    params = jax.jit(self.assemble)(trained, weights)
    if jax.process_index() == 0:
      export_stage(folder, params, self.stage, drop=self.drop)


def train_step(state, batch, frozen, *, loss_fn, **options):
  """`training.step.train_step` of an `IFRun`.

  Args:
    state: `TrainState`, of the network's parameters or of the adapters.
    batch: `image` uint8 [B, R, R, 3], `text` [B, L, D].
    frozen: of the `IFRun`.
    loss_fn: its loss.
    **options: of `take_step`.
  """

  def loss_of(params, key, image, captions):
    return loss_fn(params, key, image, captions, frozen)

  return take_step(state, loss_of, (batch['image'], batch['text']), **options)


def _choice(config, key, allowed):
  if config[key] not in allowed:
    raise UsageError(
      f'{key} is {config[key]!r}; it can be {" or ".join(allowed)}.'
    )
  return config[key]
