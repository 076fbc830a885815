"""A config's training and sampling steps, traced with shapes as inputs.

The experiment, the steps and the sharding rule are the ones that training and
sampling use.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  AxisType,
  Mesh,
  Sharding,
)
from ml_collections import ConfigDict

from imagen_jax import sharding
from imagen_jax.cascade import sampling
from imagen_jax.cascade import stage as stages
from imagen_jax.errors import UsageError, check_choice
from imagen_jax.io import text_folder
from imagen_jax.nets import bert, clip, t5, t5gemma
from imagen_jax.text import kinds, weights
from imagen_jax.text.encoder import TextEncoder, check_max_len
from imagen_jax.text.kinds import TextTower
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.program import (
  abstract_state,
  make_program,
  sets_zero,
  train_step,
)
from imagen_jax.training.stage_experiment import StageExperiment
from imagen_jax.training.state import TrainState

# {name: the network's class and its sizes}.
NAMED: dict[str, tuple[Any, Mapping[str, Any]]] = {
  **{name: (t5.T5Encoder, sizes) for name, sizes in t5.SIZES.items()},
  **{name: (bert.Bert, sizes) for name, sizes in bert.SIZES.items()},
  **{name: (clip.ClipText, sizes) for name, sizes in clip.SIZES.items()},
  **{name: (t5gemma.T5Gemma, s) for name, s in t5gemma.SIZES.items()},
}
TEXTS = ('auto', *NAMED, 'cached')
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Job:
  """A config, ready to be traced or compiled.

  Attributes:
    experiment: the `StageExperiment`, its text encoder without weights.
    text_name: such as 'T5 xxl, bfloat16'.
  """

  experiment: StageExperiment
  text_name: str
  _traces: dict[tuple[str, int], ClosedJaxpr] = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )

  @property
  def config(self) -> ConfigDict:
    return self.experiment.config

  @property
  def stage(self) -> stages.Stage:
    return self.experiment.stage

  @property
  def batch_size(self) -> int:
    """Images per step, over all devices."""
    return self.config.train.batch_size

  @property
  def accumulate(self) -> int:
    """Parts of a training batch."""
    return self.config.train.accumulate

  @property
  def remat(self) -> str | None:
    """The network's rematerialization policy, if it has one."""
    return getattr(self.stage.net, 'remat', None)

  @property
  def zero(self) -> bool:
    """Whether EMA and optimizer state are split over all devices."""
    return sets_zero(self.config)

  @functools.cached_property
  def text_params(self) -> Any:
    """Shapes of the text encoder's parameters, {} with cached embeddings."""
    return self.experiment.frozen_spec()

  @functools.cached_property
  def state(self) -> TrainState:
    """Shapes of the training state."""
    return abstract_state(self.experiment, make_optimizer(self.config.train))

  def trace(self, step: str, batch_size: int) -> ClosedJaxpr:
    """The traced 'train' or 'sample' step of `batch_size` images."""
    key = step, batch_size
    if key not in self._traces:
      trace = {'train': train_jaxpr, 'sample': sample_jaxpr}[step]
      self._traces[key] = trace(self, batch_size)
    return self._traces[key]

  def changed(
    self, keys: Mapping[str, Any], *, cached_text: bool | None = None
  ) -> 'Job':
    """The job with other values of config keys, or with cached embeddings.

    Args:
      keys: such as {'stage.net.remat': 'nothing_saveable'}.
      cached_text: None keeps what it is.
    """
    config = self.config.copy_and_resolve_references()
    with config.unlocked():
      config.update_from_flattened_dict(keys)
    if cached_text is None:
      cached_text = self.experiment.cached_text
    experiment = _RolledExperiment(
      config, text=self.experiment.text, cached_text=cached_text
    )
    return dataclasses.replace(self, experiment=experiment)


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
    text: a T5 v1.1 size or another of `NAMED`; 'cached' for cached embeddings;
      'auto' for the encoder at `text.path` or, if it is missing, the one that
      its name ends in.
    batch_size, accumulate: None means the config's.

  Raises:
    UsageError: the config is not a stage's, or `text` is unknown or not
      found.
  """
  if config.kind != 'stage':
    raise UsageError(
      f'a run of kind {config.kind!r} cannot be planned; give the config of a '
      'stage.'
    )
  check_choice('text', text, TEXTS, key='text')
  cached = text == 'cached'
  module, name = _encoder(config, 'auto' if cached else text)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.dtype = config.dtype if config.dtype in DTYPES else 'bfloat16'
    config.train.batch_size = batch_size or config.train.batch_size
    config.train.accumulate = accumulate or config.train.accumulate
  encoder = _abstract_encoder(module, config)
  return Job(
    _RolledExperiment(config, text=encoder, cached_text=cached),
    text_name='cached embeddings' if cached else name,
  )


class _RolledExperiment(StageExperiment):
  """A stage whose loops stay rolled, as on an accelerator."""

  def __init__(
    self, config: ConfigDict, *, text: TextEncoder, cached_text: bool
  ):
    super().__init__(config, text=text, cached_text=cached_text)
    net = self.stage.net
    if hasattr(net, 'unroll'):
      self.stage = dataclasses.replace(self.stage, net=net.clone(unroll=False))


def _abstract_encoder(module: TextTower, config: ConfigDict) -> TextEncoder:
  """A `TextEncoder` with shapes for weights and no tokenizer."""
  check_max_len(config.text.max_len, None, module)
  nothing: Any = None  # there are no prompts to tokenize
  return TextEncoder(
    module=module,
    params=weights.abstract_params(module),
    tokenizer=nothing,
    dim=module.width,
    max_len=config.text.max_len,
    digest='',
  )


def _encoder(config: ConfigDict, text: str) -> tuple[TextTower, str]:
  """(network, name), from a size, a folder, or the folder's name."""
  dtype = config.text.dtype
  path = text_folder.find(config.text.path)
  if text == 'auto' and (path / 'config.json').is_file():
    found = kinds.read_config(path)
    kind = kinds.recognise(path, found, config.text.get('kind'))
    module = kinds.module_from_config(
      path, found, kind=kind, dtype=DTYPES[dtype]
    )
    return module, f'{kind} of {pathlib.Path(config.text.path).name}, {dtype}'
  if text == 'auto':
    names = '|'.join(sorted(NAMED, key=len, reverse=True))
    match = re.search(rf'({names})/?$', str(path))
    if match is None:
      raise UsageError(
        f'there is no text encoder at text.path, {str(path)!r}, whose name '
        f'does not end in a known size; choose one of {", ".join(NAMED)}, '
        'or set text.path=demo for the bundled one.',
        key='text',
      )
    text = match[1]
  made, sizes = NAMED[text]
  name = f'T5 {text}' if text in t5.SIZES else text
  return made(**sizes, dtype=DTYPES[dtype]), f'{name}, {dtype}'


def train_jaxpr(job: Job, batch_size: int) -> ClosedJaxpr:
  """The traced training step of `batch_size` images on one accelerator."""
  tx = make_optimizer(job.config.train)
  step = train_step(job.experiment, tx, unroll=False)
  arguments = job.state, job.experiment.batch_spec(batch_size), job.text_params
  with jax.sharding.use_abstract_mesh(_accelerator()):  # nothing can run
    return jax.make_jaxpr(step)(*arguments)


def _accelerator() -> AbstractMesh:
  """One device that is no CPU, for which attention is computed otherwise."""
  device = AbstractDevice(device_kind='', num_cores=None, platform='tpu')
  return AbstractMesh(
    (1, 1),
    sharding.AXES,
    axis_types=(AxisType.Auto,) * 2,  # else Explicit in newer jax
    abstract_device=device,
  )


def lower_train(job: Job, mesh: Mesh) -> jax.stages.Lowered:
  """The training step lowered for a mesh of devices that need not exist."""
  program = make_program(job.experiment, mesh, unroll=False)
  with jax.set_mesh(mesh):  # under which nothing can run
    return program.traced.lower()


def sample_arguments(
  job: Job, batch_size: int, shardings: Sharding | None = None
) -> tuple[Any, tuple[dict, sampling.SampleInputs]]:
  """(function, shapes) of one call that samples `batch_size` images.

  Args:
    job: the `Job`.
    batch_size: images.
    shardings: of the images.

  Returns:
    `sampling.sampler`, jitted, and (parameters, `SampleInputs`) for it.
  """
  stage, config = job.stage, job.stage.sampling
  shape: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  # A weaker model is named when sampling, and unknown here.
  scalars: dict[str, Any] = config.scalars | {'autoguidance': None}
  low = None
  if stage.low_resolution is not None:
    side = stage.low_resolution
    low = shape((batch_size, side, side, 3))
  inputs = sampling.SampleInputs(
    keys=shape((batch_size, 2), dtype=jnp.uint32),
    text=shape((batch_size, stage.text_len, stage.text_dim)),
    mask=shape((batch_size, stage.text_len), dtype=bool),
    low_res=low,
    **scalars,
  )
  generate = jax.jit(
    sampling.sampler(stage, config.spec), out_shardings=shardings
  )
  return generate, (stages.param_shapes(stage), inputs)


def sample_jaxpr(job: Job, batch_size: int) -> ClosedJaxpr:
  """The traced sampling call, on one accelerator."""
  generate, shapes = sample_arguments(job, batch_size)
  with jax.sharding.use_abstract_mesh(_accelerator()):
    return jax.make_jaxpr(generate)(*shapes)


def lower_sample(job: Job, mesh: Mesh) -> jax.stages.Lowered:
  """The sampling call lowered for a mesh, with the cascade's shardings."""
  rows = sharding.batch_sharding(mesh)
  generate, (params, inputs) = sample_arguments(job, job.batch_size, rows)

  def split(x: Any) -> Any:  # all but the scalars
    return (
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) if x.shape else x
    )

  with jax.set_mesh(mesh):
    return generate.lower(
      sharding.with_shardings(params, sharding.state_shardings(params, mesh)),
      jax.tree.map(split, inputs),
    )
