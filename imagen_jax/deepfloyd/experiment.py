"""Fine-tuning of a DeepFloyd IF stage, in full or by low-rank adapters."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from imagen_jax import compiler, sharding
from imagen_jax.cascade.conditioning import box_downsample
from imagen_jax.cascade.stage import apply
from imagen_jax.deepfloyd import (
  cleaning,
  lora,
  loss,
  pipeline,
  schedule,
  text,
)
from imagen_jax.deepfloyd import stage as stages
from imagen_jax.deepfloyd import weights as weight_files
from imagen_jax.deepfloyd.export import (
  cut_variance,
  export_stage,
  without_variance,
)
from imagen_jax.deepfloyd.images import upsample
from imagen_jax.deepfloyd.unet import IFUNet
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import UsageError, check_choice
from imagen_jax.io import model_folder
from imagen_jax.training.experiment import (
  Experiment,
  Export,
  Preview,
  Start,
  Tree,
  make_experiment,
)
from imagen_jax.training.export import trained_params
from imagen_jax.training.preview import make_image_preview
from imagen_jax.typing import Array

DROP = 0.1  # fraction of captions dropped for classifier-free guidance


class IFExperiment(Experiment):
  """Fine-tuning of one IF stage; its config is like `configs/if_finetune.py`.

  The workdir holds `text/` (embeddings) and, at the end, `export/` with a stage
  folder that `sample.py` and diffusers load.

  Attributes:
    stage: the `Stage` to fine-tune.
    module: its network, without the variance channels if they are dropped.

  Raises:
    UsageError: the config is invalid.
    ModelError: the model or its text encoder is unusable.
    DataError: the data set is unusable.
  """

  frozen_name = 'frozen weights'
  needs_local_workdir = True

  def __init__(
    self,
    config: ConfigDict,
    mesh: jax.sharding.Mesh | None = None,
    workdir: pathlib.Path | None = None,
  ):
    super().__init__(config, mesh, workdir)
    if not config.model:
      raise UsageError(
        'model is not set; it is the folder of a stage, such as '
        'IF/IF-I-XL-v1.0, downloaded from Hugging Face (DeepFloyd/…).',
        key='config.model',
      )
    self.stage = stages.read(config.model)
    self.name, self.resolution = self.stage.name, self.stage.resolution
    self.adapt = _choice(config, 'method', ('lora', 'full')) == 'lora'
    self.drop = _choice(config, 'variance', ('keep', 'drop')) == 'drop'
    self.clean = cleaning.cleaner(config.text.clean)
    self.text_folder = text.find([config.text.path or config.model])
    self.dtype = resolve_dtype(config.dtype)
    self.module = IFUNet(self.stage.config, self.dtype)
    self._shapes = weight_files.abstract_params(self.stage.config)
    if self.drop:
      self.module = without_variance(self.module)
      self._shapes = jax.eval_shape(cut_variance, self._shapes)

  @property
  def _text_size(self) -> tuple[int, int]:
    return text.MAX_LEN, self.stage.config.text_dim

  def text_record(self) -> dict:
    length, dim = self._text_size
    return {'dim': dim, 'max_len': length, 'digest': None}

  def init(self, key: jax.Array) -> Tree:
    """Adapters; zeros for full fine-tuning, see `start`."""
    if self.adapt:
      return lora.init(key, self._shapes, self.config.rank)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._shapes)

  def start(self, shardings: Tree, init_from: Any | None) -> Start:
    if init_from is not None or self.adapt:
      started = super().start(shardings, init_from)
      return Start(started.params, f'starts from {self.stage.folder}')
    params = jax.device_put(self._load_weights(jnp.float32), shardings)
    return Start(params, f'starts from {self.stage.folder}')

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape, side = jax.ShapeDtypeStruct, self.resolution
    return {
      'image': shape((batch_size, side, side, 3), jnp.uint8),
      'text': shape((batch_size, *self._text_size), jnp.float32),
    }

  def frozen_spec(self) -> Tree:
    frozen: Tree = {'empty': jax.ShapeDtypeStruct(self._text_size, jnp.float32)}
    if self.adapt:
      frozen['weights'] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype), self._shapes
      )
    return frozen

  def load_frozen(self) -> Tree:
    """Embeds captions that the workdir lacks; loads the frozen weights."""
    captions = (
      self.clean(source[i]['caption'])
      for source in map(self.source, ('train', 'eval'))
      for i in range(len(source))
    )
    self._embeddings.fill(dict.fromkeys(['', *captions]))
    empty = jax.device_put(self._embedding(''), sharding.replicated(self.mesh))
    frozen = {'empty': empty}
    if self.adapt:  # the weights that adapters are added to
      frozen['weights'] = self._load_weights(self.dtype)
    return frozen

  def _load_weights(self, dtype: DTypeLike) -> dict:
    """The stage's weights, on the mesh."""
    _, params = weight_files.load(
      self.stage.folder / 'unet',
      dtype=self.dtype,
      weights_dtype=dtype,
      place=functools.partial(sharding.leaf_sharding, mesh=self.mesh),
    )
    return cut_variance(params) if self.drop else params

  def _inside(self, name: str) -> pathlib.Path:
    """A folder in the workdir."""
    if self.workdir is None:
      raise ValueError(f'{type(self).__name__} was built without a workdir')
    return self.workdir / name

  def _embedding(self, caption: str) -> np.ndarray:
    return self._embeddings.read(self.clean(caption))

  @property
  def _embeddings(self) -> text.Cache:
    dtype = self.config.text.dtype
    return text.Cache(self._inside('text'), self.text_folder, dtype)

  def example(self, example: dict) -> dict:
    return {
      'image': example['image'],
      'text': self._embedding(example['caption']),
    }

  def params(self, trained: dict, frozen: Tree) -> dict:
    """The network's parameters, adapters beside the frozen weights."""
    if not self.adapt:
      return trained
    return lora.insert(frozen['weights'], trained, self.config.scale)

  def loss(
    self, params: Tree, key: jax.Array, batch: Tree, frozen: Tree
  ) -> tuple[Array, dict]:
    keys = dict(zip(('drop', 'level', 'low', 'loss'), jax.random.split(key, 4)))
    stage, captions = self.stage, batch['text']
    x = batch['image'].astype(jnp.float32) / 127.5 - 1
    dropped = jax.random.bernoulli(keys['drop'], DROP, x.shape[:1])
    captions = jnp.where(dropped[:, None, None], frozen['empty'], captions)
    low = level = None
    if stage.noising is not None:
      low = upsample(box_downsample(x, x.shape[1] // 4), *x.shape[1:3])
      level = jax.random.randint(
        keys['level'], x.shape[:1], 0, stage.noising.num_train_timesteps
      )
      table = schedule.alphas_cumprod(stage.noising).astype(np.float32)
      abar = jnp.asarray(table)[level][:, None, None, None]
      noise = jax.random.normal(keys['low'], low.shape)
      low = jnp.sqrt(abar) * low + jnp.sqrt(1 - abar) * noise
    params = self.params(params, frozen)

    def predict(z: Array, t: Array) -> Array:
      given = z if low is None else jnp.concatenate([z, low], axis=-1)
      out: Any = apply(self.module, params, given, t, captions, level)
      return out

    return loss.hybrid_loss(
      keys['loss'],
      predict,
      x,
      loss.training_plan(stage.schedule),
      weight=0.0 if self.drop else self.config.bound_weight,
    )

  def make_preview(self, frozen: Tree) -> Callable[[Tree], Preview | None]:
    shape = (self.resolution, self.resolution, 3)
    sample = pipeline.previewer(self.stage, self.module, shape)

    def sample_trained(trained: dict, given: dict, frozen: Tree) -> Array:
      params = self.params(trained, frozen)
      return sample(params, given, frozen['empty'])

    def embed(examples: list[dict]) -> dict:
      texts = [self._embedding(example['caption']) for example in examples]
      return {'text': np.stack(texts)}

    low = self.resolution // 4 if self.stage.upsamples else None
    jitted = jax.jit(
      sample_trained, compiler_options=compiler.sampling_options()
    )
    return make_image_preview(self, jitted, embed, frozen, low_resolution=low)

  def finish(self, state: Any, frozen: Tree) -> None:
    out = self._inside('export') / self.name
    self.write(state.ema_params, out)

  def write(self, trained: dict, out: pathlib.Path) -> None:
    """Writes a stage folder with the trained weights.

    Adapters are added to the weights as the stage's folder has them, not as
    they were cast for training.
    """
    params = jax.tree.map(sharding.fetch, trained) if self.adapt else trained
    if jax.process_index():
      return
    if self.adapt:
      unet = self.stage.folder / 'unet'
      _, weights = weight_files.load(unet, place=_on_host)
      weights = jax.tree.map(np.asarray, weights)
      weights = cut_variance(weights) if self.drop else weights
      params = lora.merge(weights, params, self.config.scale)
    export_stage(out, params, self.stage, drop=self.drop)

  @classmethod
  def export(cls, request: Export) -> str:
    config = ConfigDict(model_folder.load_config(request.workdir)['config'])
    run = cast(IFExperiment, make_experiment(config, request.workdir))
    trained, step = trained_params(request, config)
    run.write(trained, request.out)
    return (
      f'{request.out}: step {step}, {request.described} weights, as diffusers '
      'has them'
    )


def _on_host(_: np.ndarray) -> jax.sharding.Sharding | None:
  """Beside a training state, a device may have no room for all weights."""
  try:
    host = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None
  return jax.sharding.SingleDeviceSharding(host)


def _choice(config: ConfigDict, key: str, allowed: Sequence[str]) -> str:
  check_choice(key, config[key], allowed, key=f'config.{key}')
  return config[key]
