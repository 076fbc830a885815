"""A config as a program: the step it will run, and the shapes it runs on.

Nothing here is the planner's own: the stage, the optimizer, the step and the
rule of where arrays live are those that training and sampling use, fed with
shapes instead of arrays.
"""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp

from imagen_jax import sharding
from imagen_jax.cascade import sampling
from imagen_jax.cascade import stage as stages
from imagen_jax.errors import UsageError
from imagen_jax.nets.t5 import SIZES, T5Encoder
from imagen_jax.text import weights
from imagen_jax.training.state import init_state, make_optimizer
from imagen_jax.training.step import jit_step, train_step

TEXTS = ('auto', *SIZES, 'cached')
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Job:
  """A config, ready to be traced or compiled.

  Attributes:
    config: the ConfigDict.
    stage: its `Stage`.
    tx: its optimizer.
    text_module: the `T5Encoder`; None when embeddings come from a cache.
    text_params: shapes of its parameters, {} when None.
    text_name: such as 'T5 xxl, bfloat16'.
    batch_size: images of a step over all devices.
    accumulate: parts of a training batch.
  """

  config: object
  stage: stages.Stage
  tx: object
  text_module: T5Encoder | None
  text_params: dict
  text_name: str
  batch_size: int
  accumulate: int
  _traces: dict = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )

  @functools.cached_property
  def state(self):
    """Shapes of the training state."""
    return jax.eval_shape(
      lambda key: init_state(stages.init_params(self.stage, key), self.tx),
      jax.random.key(0),
    )

  def trace(self, step, batch_size):
    """The traced 'train' or 'sample' step of `batch_size` images."""
    key = step, batch_size
    if key not in self._traces:
      trace = {'train': train_jaxpr, 'sample': sample_jaxpr}[step]
      self._traces[key] = trace(self, batch_size)
    return self._traces[key]


def make_job(config, *, text='auto', batch_size=None, accumulate=None):
  """The `Job` of a stage's config; bfloat16 where the config says auto.

  Args:
    config: a ConfigDict.
    text: a T5 v1.1 size by name; 'cached' for embeddings made beforehand;
      'auto' for what `text.path` is or, if it is not there, is called.
    batch_size: None for the config's.
    accumulate: None for the config's.

  Raises:
    UsageError: the config is of no stage, or names no encoder.
  """
  if config.get('kind') != 'stage':
    raise UsageError('only the config of a stage can be planned.')
  length = config.text.max_len
  cached = text == 'cached'
  module, name = _encoder(config, 'auto' if cached else text)
  params = {}
  if not cached:
    params = jax.eval_shape(
      module.init,
      jax.random.key(0),
      jnp.zeros((1, length), jnp.int32),
      jnp.ones((1, length), bool),
    )['params']
    params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: _as_loaded(path[-1].key, leaf, module), params
    )
  dtype = config.dtype if config.dtype in DTYPES else 'bfloat16'
  stage = stages.from_config(
    config.stage.to_dict(),
    text_dim=module.width,
    text_len=length,
    dtype=DTYPES[dtype],
  )
  return Job(
    config=config,
    stage=_rolled(stage),
    tx=make_optimizer(config.train),
    text_module=None if cached else module,
    text_params=params,
    text_name='cached embeddings' if cached else name,
    batch_size=batch_size or config.train.batch_size,
    accumulate=accumulate or config.train.get('accumulate', 1),
  )


def _rolled(stage):
  """Loops as accelerators run them, whatever this process runs on."""
  if not hasattr(stage.net, 'unroll'):
    return stage
  return dataclasses.replace(stage, net=stage.net.clone(unroll=False))


def _encoder(config, text):
  """(T5Encoder, name) by size, by folder, or by the folder's name."""
  dtype = config.text.get('dtype', 'float32')
  path = pathlib.Path(config.text.path)
  if text == 'auto' and path.name == 'demo':
    path = pathlib.Path(weights.__file__).parents[1] / 'assets/demo/text'
  if text == 'auto' and (path / 'config.json').is_file():
    found = weights.read_config(path)
    module = weights.module_from_config(path, found, dtype=DTYPES[dtype])
    return module, f'T5 of {path.name}, {dtype}'
  if text == 'auto':
    match = re.search(r'(small|base|large|xxl|xl)/?$', str(path))
    if match is None:
      raise UsageError(
        f'text.path {str(path)!r} is no folder here and its name ends in no '
        f'size of T5 v1.1; add --text, one of {", ".join(SIZES)}.'
      )
    text = match[1]
  return T5Encoder(**SIZES[text], dtype=DTYPES[dtype]), f'T5 {text}, {dtype}'


def _as_loaded(name, leaf, module):
  """As `text.weights.load_params` leaves it: matrices in the module's type."""
  dtype = jnp.float32 if name in weights.PRECISE else module.dtype
  return jax.ShapeDtypeStruct(leaf.shape, dtype)


def abstract_batch(job, batch_size):
  """Shapes of a training batch."""
  side, length = job.stage.resolution, job.stage.text_len
  batch = {
    'image': jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8),
    'mask': jax.ShapeDtypeStruct((batch_size, length), bool),
  }
  if job.text_module is None:
    shape = (batch_size, length, job.stage.text_dim)
    batch['text'] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  else:
    batch['ids'] = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
  return batch


def step_options(job):
  """The keyword arguments of `train_step`."""
  return dict(
    stage=job.stage,
    text_module=job.text_module,
    tx=job.tx,
    seed=job.config.seed,
    ema_limit=job.config.train.ema_decay,
    accumulate=job.accumulate,
    unroll=False,
  )


def train_jaxpr(job, batch_size):
  """The traced training step of `batch_size` images (no devices)."""
  return jax.make_jaxpr(lambda *args: train_step(*args, **step_options(job)))(
    job.state, abstract_batch(job, batch_size), job.text_params
  )


def lower_train(job, mesh):
  """The training step lowered for a mesh of devices that need not exist."""
  state = job.state
  shardings = sharding.state_shardings(state, mesh)
  batch = abstract_batch(job, job.batch_size)
  split = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    return jit_step(mesh, shardings, **step_options(job)).lower(
      sharding.with_shardings(state, shardings),
      sharding.with_shardings(batch, jax.tree.map(lambda _: split, batch)),
      sharding.with_shardings(
        job.text_params, sharding.state_shardings(job.text_params, mesh)
      ),
    )


def sample_arguments(job, batch_size, shardings=None):
  """(function, shapes) of one call that generates `batch_size` images.

  Args:
    job: the `Job`.
    batch_size: images.
    shardings: where the images go.

  Returns:
    `sampling.compiled`, and (parameters, `SampleInputs`) for it.
  """
  stage, config = job.stage, job.stage.sampling
  shape = jax.ShapeDtypeStruct
  low = None
  if stage.low_resolution is not None:
    side = stage.low_resolution
    low = shape((batch_size, side, side, 3), jnp.float32)
  inputs = sampling.SampleInputs(
    keys=shape((batch_size, 2), jnp.uint32),
    text=shape((batch_size, stage.text_len, stage.text_dim), jnp.float32),
    mask=shape((batch_size, stage.text_len), bool),
    low_res=low,
    **config.scalars,
  )
  generate = sampling.compiled(stage, config.spec, shardings)
  return generate, (stages.param_shapes(stage), inputs)


def sample_jaxpr(job, batch_size):
  """The traced sampling call."""
  generate, shapes = sample_arguments(job, batch_size)
  return jax.make_jaxpr(generate)(*shapes)


def lower_sample(job, mesh):
  """The sampling call lowered for a mesh, as the cascade places things."""
  split = sharding.batch_sharding(mesh)
  generate, (params, inputs) = sample_arguments(job, job.batch_size, split)
  with jax.set_mesh(mesh):
    return generate.lower(
      sharding.with_shardings(params, sharding.state_shardings(params, mesh)),
      jax.tree.map(
        lambda x: (
          jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
          if x.shape
          else x
        ),
        inputs,
      ),
    )
