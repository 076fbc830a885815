"""An experiment on a mesh: shapes, shardings and the compiled step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imagen_jax import compiler, sharding
from imagen_jax.cascade import programs
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import UsageError, check_choice
from imagen_jax.training import cpu_layout
from imagen_jax.training.experiment import Experiment
from imagen_jax.training.flops import count_flops, has_remat, without_remat
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.state import TrainState, init_state
from imagen_jax.training.step import StepFn, half_gradients, make_train_step

PRESET = 'preset'  # of `mesh.xla`


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled step, and the shapes and shardings of its arrays.

  Attributes:
    experiment: the `Experiment`.
    mesh: of the devices.
    tx: the optimizer.
    state: shapes of the `TrainState`.
    shardings: its shardings.
    step: (state, batch, frozen) -> (state, metrics), jitted; the state's
      buffers are donated.
    identity: see `Experiment.identity`, of a program that is kept on disk; None
      keeps none.
  """

  experiment: Experiment
  mesh: Mesh
  tx: optax.GradientTransformation
  state: TrainState
  shardings: TrainState
  step: Any
  identity: str | None = None

  @functools.cached_property
  def traced(self) -> jax.stages.Traced:
    """The traced step."""
    return self._trace(self.step, self._arguments())

  def _trace(self, step: Any, arguments: tuple) -> jax.stages.Traced:
    with jax.set_mesh(self.mesh):
      return step.trace(*arguments)

  def _arguments(self, batch: Any = None) -> tuple[Any, Any, Any]:
    """Shapes, with the shardings of the real arguments.

    Args:
      batch: a real one; None is one of `batch_spec`.
    """
    if batch is None:
      size = self.experiment.config.train.batch_size
      batch = self.experiment.batch_spec(size)
    rows = jax.tree.map(lambda _: sharding.batch_sharding(self.mesh), batch)
    frozen = self.experiment.frozen_spec()
    placed = sharding.state_shardings(frozen, self.mesh)
    return (
      self.abstract_state(),
      sharding.with_shardings(batch, rows),
      sharding.with_shardings(frozen, placed),
    )

  def run(
    self, state: TrainState, batch: Any, frozen: Any
  ) -> tuple[TrainState, dict]:
    """`step`, of a kept program in the form in which it is on disk."""
    if self.identity is None:
      return self.step(state, batch, frozen)
    # Images of several shapes have a program each.
    shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))
    if shapes not in self._loaded:
      self._loaded[shapes] = self._load_or_compile(self._arguments(batch))
    return self._loaded[shapes](state, batch, frozen)

  @functools.cached_property
  def _loaded(self) -> dict[tuple, Any]:
    """{shapes of a batch: the program}."""
    return {}

  def _load_or_compile(self, arguments: tuple) -> Any:
    def result(note: dict) -> tuple[Any, dict]:
      return arguments[0], dict.fromkeys(note['metrics'], 0)

    place = self._place(arguments)
    with jax.set_mesh(self.mesh):
      found = place and place.read(arguments, result)
    if found is None:
      found = self._trace(self.step, arguments).lower().compile()
      if place is not None:
        place.write(found, self._facts() | {'metrics': [*found.out_info[1]]})
    return found

  def _place(self, arguments: tuple) -> programs.Place | None:
    with jax.set_mesh(self.mesh):
      return programs.find_place(self.identity, arguments, code=('.',))

  @functools.cached_property
  def _known(self) -> dict[str, Any]:
    """What an earlier start has counted on the traced step."""
    place = self._place(self._arguments())
    return (place and place.note) or {}

  def _facts(self) -> dict[str, Any]:
    return {
      'flops': self.flops,
      'model_flops': self.model_flops,
      'spared_flops': self.spared_flops,
    }

  @functools.cached_property
  def flops(self) -> float:
    """FLOPs of a step over all devices, those of rematerialization included."""
    return self._known.get('flops') or count_flops(self.traced.jaxpr)

  @functools.cached_property
  def model_flops(self) -> float:
    """FLOPs of a step over all devices without rematerialization."""
    if 'model_flops' in self._known:
      return self._known['model_flops']
    if not has_remat(self.traced.jaxpr):
      return self.flops
    step = jax.jit(train_step(self.experiment, self.tx, remat=False))
    return count_flops(self._trace(step, self._arguments()).jaxpr)

  @functools.cached_property
  def spared_flops(self) -> list[float]:
    """See `Experiment.spared_flops`."""
    if 'spared_flops' in self._known:
      return self._known['spared_flops']
    return [*self.experiment.spared_flops]

  def abstract_state(self) -> TrainState:
    """Shapes with shardings of the state, to restore a checkpoint into."""
    return sharding.with_shardings(self.state, self.shardings)

  def as_params(self, ema: Any) -> Any:
    """An EMA, split over the devices as the parameters are."""
    params = sharding.with_shardings(self.state.params, self.shardings.params)
    return sharding.replace(ema, params)

  def first_state(self, params: Any) -> TrainState:
    """The state before the first step, on the mesh."""
    init = jax.jit(
      functools.partial(
        init_state,
        tx=self.tx,
        ema_lengths=self.experiment.config.train.ema_lengths,
      ),
      donate_argnums=0,
      out_shardings=self.shardings,
    )
    return init(params)


def abstract_state(
  experiment: Experiment, tx: optax.GradientTransformation
) -> TrainState:
  """Shapes of the training state of an experiment."""
  lengths = experiment.config.train.ema_lengths
  return jax.eval_shape(
    lambda key: init_state(experiment.init(key), tx, lengths),
    jax.random.key(0),
  )


def state_shardings(state: TrainState, mesh: Mesh, zero: bool) -> TrainState:
  """The shardings of a state.

  Args:
    state: its shapes.
    mesh: of the devices.
    zero: whether EMA and optimizer state are split over 'data' too.
  """
  placed = sharding.state_shardings(state, mesh)
  if not zero:
    return placed
  rest = ('ema_params', 'emas', 'opt_state')
  finer = {name: getattr(state, name) for name in rest}
  return placed.replace(
    **sharding.state_shardings(finer, mesh, axes=sharding.ZERO)
  )


def make_program(
  experiment: Experiment,
  mesh: Mesh,
  *,
  unroll: bool | None = None,
  keep: bool = False,
) -> Program:
  """The program of an experiment's step.

  Args:
    experiment: the `Experiment`.
    mesh: of the devices, which need not exist as long as nothing is run.
    unroll: see `make_train_step`; None means the platform's.
    keep: whether the compiled step may be kept on disk, so that the run's next
      start neither traces nor compiles. A short run, and one of several
      processes, relies on jax's cache.
  """
  tx = make_optimizer(experiment.config.train)
  state = abstract_state(experiment, tx)
  shardings = state_shardings(state, mesh, sets_zero(experiment.config))
  function, identity = train_step(experiment, tx, unroll=unroll), None
  if keep and _can_be_kept(experiment):
    function, identity = programs.renamed(function), experiment.identity
  step = jax.jit(
    function,
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
    compiler_options=_compiler_options(experiment.config, mesh),
  )
  return Program(experiment, mesh, tx, state, shardings, step, identity)


def _can_be_kept(experiment: Experiment) -> bool:
  """Whether it is worth it and there is a folder."""
  return (
    experiment.config.train.num_steps >= cpu_layout.LEAST_STEPS
    and jax.process_count() == 1
    and programs.find_folder() is not None
  )


def train_step(
  experiment: Experiment,
  tx: optax.GradientTransformation,
  *,
  unroll: bool | None = None,
  remat: bool = True,
) -> StepFn:
  """`make_train_step` of an experiment and its config.

  Args:
    experiment: the `Experiment`.
    tx: the optimizer.
    unroll: see `make_train_step`.
    remat: False: without rematerialization, see `without_remat`.

  Raises:
    UsageError: gradients cannot have the config's type.
  """
  config, train = experiment.config, experiment.config.train
  loss = experiment.loss if remat else without_remat(experiment.loss)
  half = train.gradient_dtype == 'bfloat16'
  if not half and train.gradient_dtype != 'float32':
    raise UsageError(
      f'train.gradient_dtype is {train.gradient_dtype!r}; it can be float32 or '
      'bfloat16.',
      key='config.train.gradient_dtype',
    )
  if half and resolve_dtype(config.dtype) == jnp.float32:
    raise UsageError(
      'train.gradient_dtype=bfloat16 is for activations in bfloat16, and they '
      'are float32; set dtype=bfloat16, or gradient_dtype=float32.',
      key='config.train.gradient_dtype',
    )
  return make_train_step(
    half_gradients(loss) if half else loss,
    tx,
    seed=experiment.config.seed,
    ema_limit=train.ema_decay,
    condition=experiment.condition,
    accumulate=train.accumulate,
    unroll=unroll,
    zero=sets_zero(config),
  )


def _compiler_options(config: ConfigDict, mesh: Mesh) -> dict[str, Any] | None:
  """XLA's options for a run's step.

  Raises:
    UsageError: there is no such choice.
  """
  choice = config.get('mesh', {}).get('xla', PRESET)
  check_choice('mesh.xla', choice, (PRESET, 'none'), key='config.mesh.xla')
  mine = [
    d for d in mesh.devices.flat if d.process_index == jax.process_index()
  ]
  if mine[0].platform == 'cpu':
    return cpu_layout.compiler_options(config, mesh)
  return compiler.training_options(mine[0]) if choice == PRESET else None


def sets_zero(config: ConfigDict) -> bool:
  """Whether a config sets `mesh.zero`; one from elsewhere may lack the key."""
  return bool(config.get('mesh', {}).get('zero'))
