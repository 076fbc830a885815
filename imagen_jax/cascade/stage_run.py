"""A stage of a cascade in one call: its parameters, program and images."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax.cascade import autoguidance, batching, sampling
from imagen_jax.cascade.batching import Request
from imagen_jax.cascade.programs import Program
from imagen_jax.cascade.sampling import SampleInputs
from imagen_jax.cascade.stage import SamplingConfig, Stage
from imagen_jax.diffusion import reverse
from imagen_jax.dtypes import pinned
from imagen_jax.errors import ModelError
from imagen_jax.io import model_folder
from imagen_jax.io.files import COPY_AGAIN
from imagen_jax.nets.network import Network


@dataclasses.dataclass(frozen=True)
class StageRun:
  """A stage with the settings of a call.

  Attributes:
    stage: the stage.
    record: of its folder.
    config: its sampling settings.
    mesh_for: the mesh for a network, from the bytes of its parameters.
    weak: (record, network) of the weaker model, with autoguidance.
  """

  stage: Stage
  record: model_folder.StageRecord
  config: SamplingConfig
  mesh_for: Callable[[int], jax.sharding.Mesh]
  weak: tuple[model_folder.StageRecord, Network] | None = None

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """The devices to generate on."""
    size = model_folder.float32_bytes(self.record)
    if self.weak is not None:
      size += model_folder.float32_bytes(self.weak[0])
    return self.mesh_for(size)

  def num_steps(self, *, from_image: bool) -> int:
    """The number of steps, fewer from an image with a `strength` below 1."""
    spec = self.config.spec
    return reverse.num_steps(spec, spec.strength if from_image else 1.0)

  @property
  def program(self) -> Program:
    """See `sampling.program`."""
    stage, identity = self.stage, None
    # The source code of a network of the user's own is not known.
    ours = type(stage.net).__module__.startswith('imagen_jax.nets.')
    if ours and self.weak is None:
      config = self.record.config
      identity = json.dumps([config['stage'], str(stage.net)], sort_keys=True)
    shardings = sharding.batch_sharding(self.mesh)
    return sampling.program(stage, self.config.spec, shardings, identity)

  def _put(self, x: Any) -> jax.Array:
    return jax.device_put(x, sharding.leaf_sharding(x, self.mesh))

  def prepare(
    self, request: Request, inputs: Callable[[np.ndarray], SampleInputs]
  ) -> None:
    """Compiles, in another thread, what `generate` will run.

    Errors are left to `generate`. With a weaker model, or from a workdir, whose
    parameters' shapes are not known beforehand, it does nothing.

    Args:
      request: which images.
      inputs: indices of rows -> `SampleInputs` of these shapes.
    """
    shapes = model_folder.param_shapes(self.record)
    if shapes is None or self.weak is not None or jax.process_count() > 1:
      return

    def param(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
      leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
      placed = sharding.leaf_sharding(leaf, self.mesh)
      return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)

    def array(x: np.ndarray) -> jax.ShapeDtypeStruct:
      placed = sharding.batch_sharding(self.mesh)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

    is_shape = lambda x: isinstance(x, tuple)
    params = jax.tree.map(param, shapes, is_leaf=is_shape)
    with pinned(), jax.set_mesh(self.mesh):
      _, rows = next(batching.batches(request, self.mesh))
      arrays = jax.tree.map(array, inputs(rows))
      arrays = arrays._replace(**self.config.scalars)
      state = sampling.no_state(self.stage, self.config.spec, arrays)
      step = np.int32(0)
      state = jax.tree.map(array, state)
      self.program.prepare(params, arrays, step, step, state)

  def generate(
    self, request: Request, inputs: Callable[[np.ndarray], SampleInputs]
  ) -> np.ndarray:
    """The images of all rows: float32 [N, H, W, 3] in [−1, 1].

    Args:
      request: which images.
      inputs: indices of rows -> `SampleInputs` without the scalars.

    Raises:
      ModelError: the parameters are missing, or not of this network.
      NumericError: an image is NaN or Inf.
    """
    stage, record = self.stage, self.record
    params = model_folder.load_params(record, put=self._put)
    given: dict[str, Any] = dict(self.config.scalars)
    if self.weak is not None:
      weak = model_folder.load_params(self.weak[0], put=self._put)
      given['weak'] = autoguidance.Weak(self.weak[1], weak)
    spec, program = self.config.spec, self.program
    every = None if request.preview is None else request.every

    def sample(arrays: SampleInputs) -> Iterator[batching.Partial]:
      arrays = arrays._replace(**given)
      steps = self.num_steps(from_image=arrays.image is not None)
      state: Any = sampling.no_state(stage, spec, arrays)
      state = sharding.put_whole_batch(state, self.mesh)
      first = np.int32(0)
      advance = program.prepare(params, arrays, first, first, state)
      for stop in (*range(every or steps, steps, every or steps), steps):
        state = advance(params, arrays, first, np.int32(stop), state)
        first = np.int32(stop)
        yield stop, steps, state.z, state.x

    finite = lambda arrays: sampling.finite(
      stage, params, spec, arrays._replace(**given)
    )
    try:
      images = batching.generate(
        request, stage.name, self.mesh, inputs, sample, finite
      )
    except flax.errors.FlaxError as error:
      raise ModelError(
        f'the weights of {record.path} are not those of the network that its '
        f'config describes ({str(error).partition(" (http")[0]}); '
        f'{COPY_AGAIN}.'
      ) from error
    finally:
      batching.free((params, given.get('weak')))
    return images
