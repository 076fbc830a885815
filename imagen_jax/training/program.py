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
    step: (state, batch, frozen) -> (state, metrics), compiled; the state's
      buffers are donated.
  """

  experiment: Experiment
  mesh: Mesh
  tx: optax.GradientTransformation
  state: TrainState
  shardings: TrainState
  step: Any

  @functools.cached_property
  def traced(self) -> jax.stages.Traced:
    """The traced step."""
    return self._trace(self.step)

  def _trace(self, step: Any) -> jax.stages.Traced:
    batch = self.experiment.batch_spec(self.experiment.config.train.batch_size)
    rows = jax.tree.map(lambda _: sharding.batch_sharding(self.mesh), batch)
    frozen = self.experiment.frozen_spec()
    with jax.set_mesh(self.mesh):
      # With the shardings of the real arguments, so the run need not retrace.
      return step.trace(
        self.abstract_state(),
        sharding.with_shardings(batch, rows),
        sharding.with_shardings(
          frozen, sharding.state_shardings(frozen, self.mesh)
        ),
      )

  @functools.cached_property
  def flops(self) -> float:
    """FLOPs of a step over all devices, those of rematerialization included."""
    return count_flops(self.traced.jaxpr)

  @functools.cached_property
  def model_flops(self) -> float:
    """FLOPs of a step over all devices without rematerialization."""
    if not has_remat(self.traced.jaxpr):
      return self.flops
    step = jax.jit(train_step(self.experiment, self.tx, remat=False))
    return count_flops(self._trace(step).jaxpr)

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


def place(state: TrainState, mesh: Mesh, zero: bool) -> TrainState:
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
) -> Program:
  """The program of an experiment's step.

  Args:
    experiment: the `Experiment`.
    mesh: of the devices, which need not exist as long as nothing is run.
    unroll: see `make_train_step`; None means the platform's.
  """
  tx = make_optimizer(experiment.config.train)
  state = abstract_state(experiment, tx)
  shardings = place(state, mesh, has_zero(experiment.config))
  step = jax.jit(
    train_step(experiment, tx, unroll=unroll),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
    compiler_options=_compiler_options(experiment.config, mesh),
  )
  return Program(experiment, mesh, tx, state, shardings, step)


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
    zero=has_zero(config),
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


def has_zero(config: ConfigDict) -> bool:
  """Whether a config sets `mesh.zero`; one from elsewhere may lack the key."""
  return bool(config.get('mesh', {}).get('zero'))
