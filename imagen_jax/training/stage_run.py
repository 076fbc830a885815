"""A stage of the cascade, as the loop trains it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax.cascade import objective, sampling
from imagen_jax.cascade import stage as stages
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import ModelError
from imagen_jax.io import model_folder
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.training.preview import make_preview
from imagen_jax.training.run import Run, image_shape
from imagen_jax.training.state import init_state
from imagen_jax.training.step import embed, jit_step


class StageRun(Run):
  """A `Run` of a config such as `configs/shapes_base.py`'s.

  Attributes:
    stage: the `Stage`.
    text: the text encoder.
    prepared: whether the images come with embeddings of their captions.

  Raises:
    UsageError: the config is wrong.
    ModelError: the text encoder is unusable.
    DataError: the images are.
  """

  frozen_name = 'text encoder'

  def __init__(self, config, count_flops=None):
    super().__init__(
      config, name=config.stage.name, resolution=config.stage.resolution
    )
    # Split like the state: T5-XXL does not fit beside it on one device.
    place = functools.partial(sharding.leaf_sharding, mesh=self.mesh)
    self.text = load_text_encoder(
      model_folder.text_folder(config.text.path),
      config.text.get('dtype', 'float32'),
      place=place if self.mesh.shape['fsdp'] > 1 else None,
    )
    self.max_len = config.text.max_len
    self.stage = stages.from_config(
      config.stage.to_dict(),
      text_dim=self.text.dim,
      text_len=self.max_len,
      dtype=resolve_dtype(config.dtype),
    )
    self.prepared = self.source.text_header is not None
    if self.prepared:
      self.source.check_text(
        encoder=self.text.digest,
        tokenizer=self.text.tokenizer.digest,
        max_len=self.max_len,
      )
    else:
      self.frozen = jax.device_put(
        self.text.params, sharding.state_shardings(self.text.params, self.mesh)
      )
    self.settle(
      stages.param_shapes(self.stage),
      count_flops,
      lambda shardings: jit_step(
        self.mesh,
        shardings,
        stage=self.stage,
        text_module=self.text.module,
        tx=self.tx,
        seed=config.seed,
        ema_limit=config.train.ema_decay,
        accumulate=self.accumulate,
      ),
      self._batch_shapes(),
    )

  def _batch_shapes(self):
    shape = jax.ShapeDtypeStruct
    rows, length = self.config.train.batch_size, self.max_len
    batch = {'image': image_shape(self), 'mask': shape((rows, length), bool)}
    if self.prepared:
      size = (rows, length, self.text.dim)
      return batch | {'text': shape(size, jnp.bfloat16)}
    return batch | {'ids': shape((rows, length), np.int32)}

  def new_state(self, trained):
    return init_state(trained, self.tx)

  def example(self, example):
    if self.prepared:
      return {key: example[key] for key in ('image', 'text', 'mask')}
    ids, mask, _ = self.text.tokenize(
      [example['caption']], max_len=self.max_len
    )
    return {'image': example['image'], 'ids': ids[0], 'mask': mask[0]}

  def first_state(self, init_from):
    if init_from is None:
      fresh = lambda key: self.new_state(stages.init_params(self.stage, key))
      # Long to compile and run once: on CPU, half the time without LLVM's care.
      quick = {'xla_backend_optimization_level': 0}
      on_cpu = jax.default_backend() == 'cpu'
      fresh = jax.jit(
        fresh,
        out_shardings=self.shardings,
        compiler_options=quick if on_cpu else None,
      )
      return fresh(self.key), 'from scratch'
    params = matching_params(init_from, self.abstract.params)
    state = jax.jit(self.new_state, out_shardings=self.shardings)(params)
    return state, f'starts from the weights of {init_from.path}'

  def make_preview(self):
    config = self.stage.sampling

    def sample(params, given, frozen):
      inputs = sampling.SampleInputs(
        keys=jax.random.wrap_key_data(given['keys']),
        text=given['text'],
        mask=given['mask'],
        low_res=given.get('low'),
        **config.scalars,
      )
      return sampling.sample(self.stage, params, config.spec, inputs)

    sample = jax.jit(sample, out_shardings=sharding.batch_sharding(self.mesh))
    return make_preview(self, sample, self.stage.low_resolution)

  def captions(self, captions):
    text, mask = self.text.encode(captions, max_len=self.max_len)
    return {'text': text, 'mask': mask}

  def loss(self, params, key, batch, frozen):
    text = embed(self.text.module, frozen, batch)
    values, _ = objective.loss(
      self.stage, params, key, batch['image'], text, batch['mask']
    )
    return values


def matching_params(record, abstract):
  """A stage's EMA, if it is of the same network.

  Raises:
    ModelError: it is not; the sentence names a parameter.
  """
  params = model_folder.load_params(record)
  want, have = (
    {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (abstract, params)
  )
  for name in sorted(want.keys() | have.keys()):
    if want.get(name) != have.get(name):
      raise ModelError(
        f'--init_from {record.path} is another network: {name} is '
        f'{have.get(name, "absent")} there and {want.get(name, "absent")} '
        'here; give a stage that was trained with this stage.net.'
      )
  return params
