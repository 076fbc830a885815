"""The cascade's samplers at real size, by the time of a step of theirs."""

from collections.abc import Mapping
from typing import Any

import accelerator_train as train
import jax
import numpy as np
from accelerator_work import LeftOut, call_times, median, memory, random_tree

from imagen_jax import sharding
from imagen_jax.cascade import sampling, stage

FEW, MORE = 4, 8  # steps that are timed
TINY = 1, 33  # in a rehearsal, where a step takes next to nothing


class Work:
  """A stage's sampler, as `sample.py` compiles it."""

  def __init__(self, given: Mapping[str, Any], rehearse: bool) -> None:
    self._rehearse, self._mesh = rehearse, train.mesh()
    made = train.job(given['config'], given['batch'], {}, rehearse)
    self._stage, self._batch = made.stage, given['batch']
    self._spec = self._stage.sampling.spec
    rows = sharding.batch_sharding(self._mesh)
    self._program = sampling.program(self._stage, self._spec, rows, None)
    self._params = stage.param_shapes(self._stage)
    self._shardings = sharding.state_shardings(self._params, self._mesh)

  def compile(self) -> None:
    params = sharding.with_shardings(self._params, self._shardings)
    inputs, scalars = self._inputs(), self._stage.sampling.scalars
    state = sampling.no_state(
      self._stage, self._spec, inputs._replace(**scalars)
    )
    inputs, state = sharding.put_whole_batch((inputs, state), self._mesh)
    # The others are scalars.
    inputs = inputs._replace(**scalars)
    self._given = inputs, state
    with jax.set_mesh(self._mesh):
      self._run = self._program.prepare(
        params, self._given[0], np.int32(0), np.int32(FEW), self._given[1]
      )

  def measure(self) -> dict[str, Any]:
    params = random_tree(self._params, self._shardings)
    numbers = TINY if self._rehearse else (FEW, MORE)
    few, more = (self._seconds(params, steps) for steps in numbers)
    if more <= few:
      raise LeftOut('more steps took no longer than a few')
    evaluation = (more - few) / (numbers[1] - numbers[0])
    return {
      'batch': self._batch,
      'steps': self._spec.steps,
      'evaluation': evaluation,
      'call': max(few - numbers[0] * evaluation, 0.0),
      'timed': dict(zip(numbers, (few, more))),
      'gib': memory(self._run),
    }

  def _seconds(self, params: Any, steps: int) -> float:
    """Of a call that takes so many steps."""
    call = lambda: self._call(params, steps)
    return median(call_times(call, self._rehearse))

  def _call(self, params: Any, steps: int) -> jax.Array:
    inputs, state = self._given
    with jax.set_mesh(self._mesh):
      return self._run(params, inputs, np.int32(0), np.int32(steps), state).x

  def _inputs(self) -> sampling.SampleInputs:
    """Noise for text and low-resolution images."""
    made, rng = self._stage, np.random.default_rng(0)
    normal = lambda *size: rng.normal(size=(self._batch, *size))
    low = None
    if made.low_resolution is not None:
      side = made.low_resolution
      low = normal(side, side, 3).clip(-1, 1).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), self._batch)
    return sampling.SampleInputs(
      keys=np.asarray(jax.random.key_data(keys)),
      text=normal(made.text_len, made.text_dim).astype(np.float32),
      mask=np.ones((self._batch, made.text_len), bool),
      low_res=low,
    )
