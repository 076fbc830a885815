"""The interface between the training loop and what it trains.

The loop restores, steps and saves. An `Experiment` supplies the rest: the
parameters, the loss, the batch, the data set, the previews and the export. The
planner traces the same object on a machine that has neither the data nor the
devices.
"""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imagen_jax import kinds, sharding
from imagen_jax.compiler import QUICK
from imagen_jax.data.pipeline import flip
from imagen_jax.data.source import Source
from imagen_jax.data.sources import make_source
from imagen_jax.errors import UsageError
from imagen_jax.io import bucket
from imagen_jax.io.paths import check_folder
from imagen_jax.typing import Array

# Each kind is one file, imported on demand.
KINDS = {
  'stage': 'imagen_jax.training.stage_experiment:StageExperiment',
  'distill': 'imagen_jax.training.distillation:DistillExperiment',
  'moments': 'imagen_jax.training.distillation:MomentExperiment',
  'text': 'imagen_jax.worlds.pretraining:TextExperiment',
  'if_finetune': 'imagen_jax.deepfloyd.experiment:IFExperiment',
}

Tree = Any  # a pytree of arrays, or of their shapes
# (example, its own generator) -> example
Augment = Callable[[dict, np.random.Generator], dict]
Preview = np.ndarray | str  # a grid uint8 [H, W, 3], or lines of text


@dataclasses.dataclass(frozen=True)
class Start:
  """The parameters that a new run starts from.

  Attributes:
    params: on the mesh.
    origin: where they come from, in words, for the log.
  """

  params: Tree
  origin: str


@dataclasses.dataclass(frozen=True)
class Export:
  """The arguments of `imagen-export`.

  Attributes:
    workdir: the training directory.
    out: the directory to write.
    weights: 'ema' or 'raw'.
    ema: length of an EMA from the run's snapshots, instead of `weights`.
    step: of the checkpoint; None takes the newest good one.
    dtype: of the stored weights, 'bfloat16' or 'float32'.
    command: the command line, kept as provenance.

  Raises:
    UsageError: `out` exists, or cannot be made; or `ema` is not for `weights`.
  """

  workdir: pathlib.Path
  out: pathlib.Path
  weights: str = 'ema'
  ema: float | None = None
  step: int | None = None
  dtype: str = 'bfloat16'
  command: str = ''

  def __post_init__(self) -> None:
    if check_folder(self.out, key='out').exists():
      raise UsageError(
        f'{self.out} exists; choose another, or remove it.', key='out'
      )
    if self.ema is not None and self.weights != 'ema':
      raise UsageError('has no effect with raw weights.', key='ema')

  @property
  def described(self) -> str:
    """The weights, in words: 'raw', 'ema' or 'ema 0.08'."""
    return self.weights if self.ema is None else f'ema {self.ema}'


class Experiment(abc.ABC):
  """What a config trains; built once, then only read.

  Derive from it to train a model of your own: `--config.kind` may be
  'my_module:MyExperiment'. `init`, `loss`, `batch_spec` and `example` are
  abstract; the rest has defaults.

  Attributes:
    config: the ConfigDict; the loop reads its `train`, `data`, `mesh`, `seed`.
    workdir: the run's directory; nothing is written into it here.
    name: of the model, for the log.
    resolution: side of the images, in pixels.
    frozen_name: what `frozen` is called in the startup report.
    needs_local_workdir: whether it writes files of its own to the workdir.

  Raises:
    UsageError: the workdir is in a bucket and must not be.
  """

  frozen_name: ClassVar[str] = 'frozen'
  needs_local_workdir: ClassVar[bool] = False
  name: str
  resolution: int

  def __init__(
    self,
    config: ConfigDict,
    mesh: Mesh | None = None,
    workdir: pathlib.Path | None = None,
  ):
    if workdir and bucket.is_bucket(workdir) and self.needs_local_workdir:
      raise UsageError(
        f'{workdir} is in a bucket, and this kind of run writes a model to its '
        'workdir; give a local folder. Its checkpoints may be in a bucket '
        '(train.checkpoint_dir).',
        key='workdir',
      )
    self.config, self._mesh, self.workdir = config, mesh, workdir
    self.source: Callable[[str], Source] = functools.cache(self.make_source)

  @property
  def mesh(self) -> Mesh:
    """The mesh of devices.

    Raises:
      ValueError: the experiment was built without one, to be traced only.
    """
    if self._mesh is None:
      raise ValueError(f'{type(self).__name__} was built without a mesh')
    return self._mesh

  @property
  def identity(self) -> str | None:
    """All that the step depends on but the package's code and its arguments.

    None: it is not known, as with code from elsewhere, and the compiled step is
    not kept for the run's next start.
    """
    return None

  # ---- The model -----------------------------------------------------------
  @abc.abstractmethod
  def init(self, key: jax.Array) -> Tree:
    """The parameters of a new run; traced when only shapes are needed."""

  @abc.abstractmethod
  def loss(
    self, params: Tree, key: jax.Array, batch: Tree, frozen: Tree
  ) -> tuple[Array, dict]:
    """([B] losses, details) of `condition`'s batch; see `make_train_step`."""

  @abc.abstractmethod
  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch, whose rows are `example`'s."""

  def condition(self, key: jax.Array, batch: Tree, frozen: Tree) -> Tree:
    """The batch as `loss` takes it; computed once a step, no gradient.

    `loss` may be given a part of it at a time, with a key for each: what
    depends on the whole batch is made here. Its entry `measured` is a dict of
    further metrics of the step.
    """
    del key, frozen
    return batch

  @property
  def spared_flops(self) -> Sequence[float]:
    """FLOPs that a step takes less than `count_flops` finds, by text bucket.

    If all captions were encoded in that one of `text.encoder.buckets`; the
    fraction of each is the metric `text_buckets`. Empty: it takes them all.
    """
    return ()

  def frozen_spec(self) -> Tree:
    """Shapes of the frozen arrays."""
    return {}

  def load_frozen(self) -> Tree:
    """The arrays that the loss reads without training them, on the mesh."""
    return {}

  def start(self, shardings: Tree, init_from: Any | None) -> Start:
    """The parameters of a new run.

    Args:
      shardings: of the parameters.
      init_from: a `StageRecord` whose EMA to start from, or None.

    Raises:
      UsageError: this kind of experiment cannot start from a stage.
      ModelError: the stage is of another network.
    """
    if init_from is not None:
      raise UsageError(
        f'a run of kind {self.config.kind} cannot start from a stage; leave '
        'it out.',
        key='init_from',
      )
    init = jax.jit(
      self.init,
      out_shardings=shardings,
      compiler_options=QUICK if jax.default_backend() == 'cpu' else None,
    )
    return Start(init(jax.random.key(self.config.seed)), 'from scratch')

  # ---- The data ------------------------------------------------------------
  @abc.abstractmethod
  def example(self, example: dict) -> dict:
    """An example of the source as a row of the batch, without `index`."""

  def make_source(self, split: str) -> Source:
    """The data set of 'train' or 'eval'; `source` is this, cached."""
    data = self.config.data.to_dict()
    data.pop('flip')  # see `augmentation`
    data.pop('workers')  # see `workers`
    return make_source(**data, size=self.resolution, split=split)

  def workers(self, split: str) -> int:
    """How many processes read the examples of a split; 0: threads do."""
    return self.config.data.workers if split == 'train' else 0

  def augmentation(self, split: str) -> Augment | None:
    """What is random about the examples of a split, or None.

    Its result goes to `example`.
    """
    return flip if self.config.data.flip and split == 'train' else None

  def has_eval_split(self) -> bool:
    """Whether the eval split differs from the training split."""
    return self.source('train').has_eval_split or bool(
      self.config.data.eval_path
    )

  def text_record(self) -> dict | None:
    """`dim`, `max_len` and `digest` of the text encoder, for config.json."""
    return None

  # ---- What comes out ------------------------------------------------------
  def make_preview(
    self, frozen: Tree
  ) -> Callable[[Tree], Preview | None] | None:
    """The function EMA parameters -> preview (None off process 0), or None.

    Every process calls it. None means that there are no previews.
    """
    del frozen
    return None

  def finish(self, state: Any, frozen: Tree) -> None:
    """Called by every process after the last step."""

  @classmethod
  def export(cls, request: Export) -> str:
    """Writes the finished model; returns a line that describes it.

    Raises:
      UsageError: this kind of experiment has no export.
    """
    raise UsageError(
      f'{request.workdir} holds a run of a kind that has no export; use its '
      'checkpoints.'
    )


def find_experiment(kind: str) -> type[Experiment]:
  """The class of a kind of experiment.

  Args:
    kind: one of `KINDS`, or 'my_module:MyExperiment'.

  Raises:
    UsageError: there is no such class.
  """
  return kinds.find(kind, KINDS, key='config.kind', base=Experiment)


def make_experiment(
  config: ConfigDict, workdir: pathlib.Path | None = None
) -> Experiment:
  """The experiment of a config, on the config's mesh.

  Raises:
    UsageError: unknown kind, or a mesh or batch that does not fit the devices.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  sharding.check_batch_size(
    config.train.batch_size, mesh, config.train.accumulate
  )
  return find_experiment(config.kind)(config, mesh, workdir)
