"""Training steps at real size, of data that are on the device already."""

import pathlib
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import accelerator_trace as traces
import jax
import jax.numpy as jnp
from accelerator_work import (
  LeftOut,
  call_times,
  median,
  memory,
  random_tree,
  utilization,
)

from imagen_jax import sharding
from imagen_jax.cli.configs import load_config
from imagen_jax.planning.job import Job, make_job
from imagen_jax.training.flops import count_flops
from imagen_jax.training.program import make_program

PROFILED = 3  # steps
# Without what changes no FLOPs of the model.
PLAIN = {'stage.net.remat': None, 'stage.net.attention': 'xla'}
# Networks of the same kinds, for a rehearsal on a CPU.
TINY_UNET = {
  'stage.resolution': 8,
  'stage.net.channels': 8,
  'stage.net.channel_mults': (1,),
  'stage.net.num_res_blocks': 1,
  'stage.net.attention_resolutions': (8,),
  'stage.net.head_dim': 8,
  'stage.net.emb_channels': 8,
  'stage.net.text_width': 8,
  'stage.net.norm_groups': 2,
}
TINY_EFFICIENT = {
  'stage.resolution': 16,
  'stage.low_resolution': 8,
  'stage.net.channels': (8,),
  'stage.net.num_res_blocks': (1,),
  'stage.net.strides': (2,),
  'stage.net.self_attention': (False,),
  'stage.net.text_attention': (True,),
  'stage.net.num_heads': 2,
  'stage.net.emb_channels': 8,
  'stage.net.text_width': 8,
  'stage.net.norm_groups': 2,
}
TINY = {
  'base64': TINY_UNET,
  'sr256': TINY_EFFICIENT,
  'sr1024': TINY_EFFICIENT | {'stage.crop': 8},
}


def job(
  config: str, batch: int, change: Mapping[str, Any], rehearse: bool
) -> Job:
  """A config's stage with cached text, a tiny one to rehearse."""
  made = load_config(f'imagen_{config}')
  keys = {'mesh.fsdp': 1, **change}
  if rehearse:
    batch = max(2, batch // 16)
    keys |= {'text.max_len': 16, 'dtype': 'float32', **TINY[config]}
  with made.unlocked():
    made.update_from_flattened_dict(keys)
  return make_job(made, text='cached', batch_size=batch)


def mesh() -> jax.sharding.Mesh:
  """The first device."""
  return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


_counted: dict[tuple[int, str], float] = {}
_counting = threading.Lock()


def model_flops(work: Job) -> float:
  """FLOPs of a job's training step without rematerialization."""
  given = work.batch_size, str(work.changed(PLAIN).config)
  with _counting:  # rows that share them are counted once
    if given not in _counted:
      _counted[given] = count_flops(
        work.changed(PLAIN).trace('train', work.batch_size)
      )
    return _counted[given]


class Work:
  """A training step; `steps`: the losses of so many, instead of their time."""

  def __init__(self, given: Mapping[str, Any], rehearse: bool) -> None:
    change = {
      key: tuple(value) if isinstance(value, list) else value
      for key, value in given['change'].items()
    }
    if change.get('stage.net.attention') == 'cudnn' and not rehearse:
      if jax.default_backend() != 'gpu':
        raise LeftOut('cuDNN is for NVIDIA GPUs')
    self._given, self._rehearse = given, rehearse
    self._job = job(given['config'], given['batch'], change, rehearse)
    self._model_flops = model_flops(self._job)
    self._mesh = mesh()
    self._program = make_program(self._job.experiment, self._mesh)

  def compile(self) -> None:
    with jax.set_mesh(self._mesh):
      self._compiled = self._program.traced.lower().compile()

  def measure(self) -> dict[str, Any]:
    shardings = self._program.shardings
    params = random_tree(self._program.state.params, shardings.params)
    self._state = self._program.first_state(params)
    self._batch = self._random_batch()
    if 'steps' in self._given:
      return {'run': [self._numbers() for _ in range(self._given['steps'])]}
    seconds = call_times(self._step, self._rehearse)
    each = median(seconds)
    result = {
      'batch': self._job.batch_size,
      'seconds': each,
      'times': seconds,
      'gib': memory(self._compiled),
      'flops': self._program.flops,
      'model_flops': self._model_flops,
    }
    for name, flops in ('mfu', 'model_flops'), ('hfu', 'flops'):
      result[name] = utilization(result[flops], each)
    if self._given['profile']:
      result['ops'] = self._profile()
    return result

  def _step(self) -> Any:
    self._state, metrics = self._compiled(self._state, self._batch, {})
    return metrics

  def _numbers(self) -> list[str]:
    """A step's loss and norm of the gradient, to the bit."""
    metrics = self._step()
    return [float(metrics[key]).hex() for key in ('loss', 'grad_norm')]

  def _random_batch(self) -> dict[str, jax.Array]:
    """Noise for images and text, every token of which is there."""
    size = self._job.batch_size

    def fill(like: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
      if like.dtype == jnp.uint8:
        return jax.random.bits(key, like.shape, jnp.uint8)
      if like.dtype == bool:
        return jnp.ones(like.shape, bool)
      return jax.random.normal(key, like.shape, like.dtype)

    spec = self._job.experiment.batch_spec(size)
    keys = dict(zip(spec, jax.random.split(jax.random.key(1), len(spec))))
    made = {name: fill(like, keys[name]) for name, like in spec.items()}
    return jax.device_put(made, sharding.batch_sharding(self._mesh))

  def _profile(self) -> dict[str, Any]:
    """The time of a step by class of operation."""
    try:
      with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
          for _ in range(PROFILED):
            metrics = self._step()
          jax.block_until_ready((metrics, self._state))
        events = traces.read(pathlib.Path(folder))
      paths = traces.scopes(self._compiled.as_text() or '')
      return traces.summarise(events, paths, PROFILED)
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
      return {'left_out': ' '.join(str(error).split())[:200]}
