"""A config's training and sampling steps, traced with shapes as inputs.

The experiment, the steps and the sharding rule are the ones that training and
sampling use.
"""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from imagen_jax import sharding
from imagen_jax.cascade import sampling
from imagen_jax.cascade import stage as stages
from imagen_jax.errors import UsageError
from imagen_jax.io import model_folder
from imagen_jax.nets.t5 import SIZES, T5Encoder
from imagen_jax.text import weights
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.program import make_program, train_step
from imagen_jax.training.stage_experiment import StageExperiment
from imagen_jax.training.state import init_state

TEXTS = ('auto', *SIZES, 'cached')
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Job:
  """A config, ready to be traced or compiled.

  Attributes:
    experiment: the `StageExperiment`, its text encoder without weights.
    text_name: such as 'T5 xxl, bfloat16'.
    batch_size: images per step, over all devices.
    accumulate: parts of a training batch.
  """

  experiment: StageExperiment
  text_name: str
  batch_size: int
  accumulate: int
  _traces: dict = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )

  @property
  def config(self):
    return self.experiment.config

  @property
  def stage(self):
    return self.experiment.stage

  @functools.cached_property
  def text_params(self):
    """Shapes of the text encoder's parameters, {} with cached embeddings."""
    return self.experiment.frozen_spec()

  @functools.cached_property
  def state(self):
    """Shapes of the training state."""
    tx = make_optimizer(self.config.train)
    return jax.eval_shape(
      lambda key: init_state(self.experiment.init(key), tx), jax.random.key(0)
    )

  def trace(self, step, batch_size):
    """The traced 'train' or 'sample' step of `batch_size` images."""
    key = step, batch_size
    if key not in self._traces:
      trace = {'train': train_jaxpr, 'sample': sample_jaxpr}[step]
      self._traces[key] = trace(self, batch_size)
    return self._traces[key]

  def with_remat(self, policy):
    """The job with another rematerialization policy."""
    config = self.config.copy_and_resolve_references()
    with config.unlocked():
      config.stage.net.remat = policy
    old = self.experiment
    new = _experiment(config, old.text, old.cached_text)
    return dataclasses.replace(self, experiment=new)

  def with_cached_text(self):
    """The job with cached embeddings of the captions."""
    new = _experiment(self.config, self.experiment.text, True)
    return dataclasses.replace(self, experiment=new)


def make_job(
  config: ConfigDict,
  *,
  text: str = 'auto',
  batch_size: int | None = None,
  accumulate: int | None = None,
) -> Job:
  """The `Job` of a stage's config, in bfloat16 if its dtype is 'auto'.

  Args:
    config: a ConfigDict.
    text: a T5 v1.1 size; 'cached' for cached embeddings; 'auto' for the
      encoder at `text.path` or, if it is missing, the size in its name.
    batch_size, accumulate: None means the config's.

  Raises:
    UsageError: the config is not a stage's, or names no text encoder.
  """
  if config.kind != 'stage':
    raise UsageError('only the config of a stage can be planned.')
  cached = text == 'cached'
  module, name = _encoder(config, 'auto' if cached else text)
  config = config.copy_and_resolve_references()
  if config.dtype not in DTYPES:
    with config.unlocked():
      config.dtype = 'bfloat16'
  return Job(
    experiment=_experiment(config, _abstract_encoder(module, config), cached),
    text_name='cached embeddings' if cached else name,
    batch_size=batch_size or config.train.batch_size,
    accumulate=accumulate or config.train.accumulate,
  )


class _RolledExperiment(StageExperiment):
  """A stage whose loops stay rolled, as on an accelerator."""

  def __init__(self, *args, **options):
    super().__init__(*args, **options)
    net = self.stage.net
    if hasattr(net, 'unroll'):
      self.stage = dataclasses.replace(self.stage, net=net.clone(unroll=False))


def _experiment(config, text, cached):
  return _RolledExperiment(config, text=text, cached_text=cached)


def _abstract_encoder(module, config):
  """A `TextEncoder` with shapes for weights and no tokenizer."""
  length = config.text.max_len
  params = jax.eval_shape(
    module.init,
    jax.random.key(0),
    jnp.zeros((1, length), jnp.int32),
    jnp.ones((1, length), bool),
  )['params']
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: _as_loaded(path[-1].key, leaf, module), params
  )
  return TextEncoder(
    module=module,
    params=params,
    tokenizer=None,
    dim=module.width,
    max_len=length,
    digest='',
  )


def _encoder(config, text):
  """(T5Encoder, name), from a size, a folder, or the folder's name."""
  dtype = config.text.dtype
  path = model_folder.text_folder(config.text.path)
  if text == 'auto' and (path / 'config.json').is_file():
    found = weights.read_config(path)
    module = weights.module_from_config(path, found, dtype=DTYPES[dtype])
    return module, f'T5 of {pathlib.Path(config.text.path).name}, {dtype}'
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
  """The spec of a loaded leaf: as `text.weights.load_params` casts it."""
  dtype = jnp.float32 if name in weights.PRECISE else module.dtype
  return jax.ShapeDtypeStruct(leaf.shape, dtype)


def train_jaxpr(job, batch_size):
  """The traced training step of `batch_size` images (no devices)."""
  step = train_step(
    job.experiment,
    make_optimizer(job.config.train),
    accumulate=job.accumulate,
    unroll=False,
  )
  batch = job.experiment.batch_spec(batch_size)
  return jax.make_jaxpr(step)(job.state, batch, job.text_params)


def lower_train(job, mesh):
  """The training step lowered for a mesh of devices that need not exist."""
  program = make_program(
    job.experiment, mesh, accumulate=job.accumulate, unroll=False
  )
  batch = job.experiment.batch_spec(job.batch_size)
  split = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    return program.step.lower(
      program.abstract_state(),
      sharding.with_shardings(batch, jax.tree.map(lambda _: split, batch)),
      sharding.with_shardings(
        job.text_params, sharding.state_shardings(job.text_params, mesh)
      ),
    )


def sample_arguments(job, batch_size, shardings=None):
  """(function, shapes) of one call that samples `batch_size` images.

  Args:
    job: the `Job`.
    batch_size: images.
    shardings: of the images.

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
  """The sampling call lowered for a mesh, with the cascade's shardings."""
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
