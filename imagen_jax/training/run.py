"""What the loop needs to know of a model that it trains."""

import abc

import jax
import jax.numpy as jnp

from imagen_jax import sharding
from imagen_jax.data.pipeline import batches, flip
from imagen_jax.data.sources import make_source
from imagen_jax.training import report
from imagen_jax.training.state import make_optimizer


class Run(abc.ABC):
  """A config made ready; `StageRun` and `IFRun` fill in what it trains.

  Attributes:
    config: the ConfigDict.
    name: of the stage.
    resolution: side of its images.
    mesh: from the config.
    tx: the optimizer.
    source: the images to train on.
    abstract: shapes of the `TrainState`.
    shardings: its shardings.
    step_fn: (state, batch, frozen) -> (state, metrics), compiled.
    frozen: what the step reads and does not train, on the devices.
    text: what has the `dim` and `digest` of the text encoder.
    flops: FLOPs of a step over all devices; None if not counted.
  """

  def __init__(self, config, *, name, resolution):
    self.config = config
    self.name, self.resolution = name, resolution
    self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    self.accumulate = config.train.get('accumulate', 1)
    sharding.check_batch_size(
      config.train.batch_size, self.mesh, self.accumulate
    )
    self.tx = make_optimizer(config.train)
    self.source = self.images('train')
    self.key = jax.random.key(config.seed)
    self.frozen, self.flops = {}, None

  def images(self, split):
    """The captioned images of 'train' or 'eval'."""
    data = self.config.data.to_dict()
    data.pop('flip', None)  # the pipeline's business
    eval_path = data.pop('eval_path', None)
    if split == 'eval' and eval_path:
      data['path'] = eval_path
    return make_source(**data, size=self.resolution, split=split)

  def holds_out(self):
    """Whether the eval split is not the one that is trained on."""
    return self.source.has_eval_split or bool(self.config.data.get('eval_path'))

  def stream(self, source, **options):
    """This process's batches, see `data.pipeline.batches`."""
    return batches(
      source,
      seed=self.config.seed,
      batch_size=self.config.train.batch_size,
      host=jax.process_index(),
      num_hosts=jax.process_count(),
      transform=self.example,
      **options,
    )

  def train_stream(self, start):
    """The batches that training reads after step `start`."""
    augment = flip if self.config.data.get('flip') else None
    return self.stream(self.source, start_step=start, augment=augment)

  def settle(self, trained, count_flops, step_fn, batch):
    """Notes shapes and shardings of the state, and the step.

    Args:
      trained: shapes of the parameters that are trained.
      count_flops: function of the traced step, or None.
      step_fn: function of the shardings that compiles the step.
      batch: shapes of one global batch.
    """
    self.abstract = jax.eval_shape(self.new_state, trained)
    self.shardings = sharding.state_shardings(self.abstract, self.mesh)
    self.step_fn = step_fn(self.shardings)
    if count_flops is not None:
      # With the shardings of the arrays to come, so that it is traced once.
      state = sharding.with_shardings(self.abstract, self.shardings)
      rows = jax.tree.map(lambda _: sharding.batch_sharding(self.mesh), batch)
      batch = sharding.with_shardings(batch, rows)
      with jax.set_mesh(self.mesh):
        traced = self.step_fn.trace(state, batch, self.frozen)
        self.flops = count_flops(traced.jaxpr)

  def describe(self, arrays=False):
    """The startup report, as lines; `arrays` adds what is split."""
    where = sharding.state_shardings(self.frozen, self.mesh)
    yield from report.startup(
      self.name,
      self.mesh,
      self.abstract,
      self.shardings,
      (self.frozen, where),
      frozen_name=self.frozen_name,
      batch_size=self.config.train.batch_size,
      flops=self.flops,
    )
    fsdp = self.mesh.shape['fsdp']
    if arrays and fsdp > 1:
      yield from report.splits(self.abstract, self.shardings, fsdp)

  # ---- What a model fills in ---------------------------------------------
  frozen_name = 'frozen'

  @abc.abstractmethod
  def new_state(self, trained):
    """The `TrainState` before the first step."""

  @abc.abstractmethod
  def example(self, example):
    """One example of the source as the step takes it, without `index`."""

  def open(self, workdir):
    """Loads what a dry run does not need."""

  @abc.abstractmethod
  def first_state(self, init_from):
    """(state on the mesh, where it came from) of a new run.

    Args:
      init_from: a `StageRecord` to start from, or None.
    """

  @abc.abstractmethod
  def make_preview(self):
    """A function: EMA parameters -> uint8 grid, None off the first process."""

  @abc.abstractmethod
  def loss(self, params, key, batch, frozen):
    """[B] losses of a batch, for the held-out loss."""

  @abc.abstractmethod
  def captions(self, captions):
    """A list of sentences as arrays for `preview.make_preview`'s `generate`."""

  def finish(self, state, workdir):
    """What is left to do after the last step; every process calls it."""


def split_index(batch):
  """(what goes to the devices, where in the source it came from)."""
  return {k: v for k, v in batch.items() if k != 'index'}, batch['index']


def image_shape(run):
  """The shape of a global batch's images."""
  side = run.resolution
  shape = (run.config.train.batch_size, side, side, 3)
  return jax.ShapeDtypeStruct(shape, jnp.uint8)
