"""Training one stage of the cascade."""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imagen_jax import compiler, sharding
from imagen_jax.cascade import objective, sampling, settings, stage_config
from imagen_jax.cascade import stage as stages
from imagen_jax.data.pipeline import crop
from imagen_jax.diffusion.loss import times
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import leaves, model_folder, text_folder
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.text.encoder import (
  TextEncoder,
  buckets,
  encode_by_length,
  encode_tokens,
  find_mark,
  load_text_encoder,
)
from imagen_jax.training.experiment import (
  Augment,
  Experiment,
  Export,
  Preview,
  Start,
  Tree,
)
from imagen_jax.training.export import export_stage
from imagen_jax.training.flops import count_flops
from imagen_jax.training.preview import make_image_preview
from imagen_jax.typing import Array


class StageExperiment(Experiment):
  """Trains a base or super-resolution stage on captioned images.

  Attributes:
    stage: the `Stage`.
    cached_text: whether the data set has the embeddings of its captions. The
      text encoder is then not loaded.
    text_dim: width of the embeddings.

  Raises:
    UsageError: the config is invalid.
    ModelError: the text encoder is unusable.
    DataError: the data set is unusable, or its embeddings are those of
      another text encoder.
  """

  frozen_name = 'text encoder'

  def __init__(
    self,
    config: ConfigDict,
    mesh: Mesh | None = None,
    workdir: pathlib.Path | None = None,
    *,
    text: TextEncoder | None = None,
    cached_text: bool | None = None,
  ):
    """Builds the networks.

    Args:
      config, mesh, workdir: see `Experiment`.
      text: the text encoder; None loads the config's. For tracing, its
        parameters may be shapes and its tokenizer None.
      cached_text: see the attribute; None takes it from the data set.
    """
    super().__init__(config, mesh, workdir)
    self.name, self.resolution = config.stage.name, config.stage.resolution
    self._header = None if cached_text is not None else self._stored_text(text)
    self.cached_text = bool(cached_text) or self._header is not None
    self._text = text
    if text is None and self._header is None:
      self._text = _load_text(config, mesh)
    self.text_dim = (
      self.text.dim if self._header is None else self._header['dim']
    )
    self.stage = stage_config.from_config(
      config.stage.to_dict(),
      text_dim=self.text_dim,
      text_len=config.text.max_len,
      dtype=resolve_dtype(config.dtype),
    )
    _check_sampling(self.stage)
    if cached_text is None:
      source = self.source('train')
      for part in source.parts or (source,):
        _check_buckets(self.stage, part.buckets)

  @property
  def identity(self) -> str | None:
    nets = [self.stage.net, *([] if self.cached_text else [self.text.module])]
    classes = [type(self), *map(type, nets)]
    if not all(made.__module__.startswith('imagen_jax.') for made in classes):
      return None
    names = [f'{made.__module__}.{made.__qualname__}' for made in classes]
    config = self.config.to_json_best_effort()
    return json.dumps([*names, *map(repr, nets), self.text_record(), config])

  @property
  def text(self) -> TextEncoder:
    """The text encoder, frozen.

    Raises:
      ValueError: the data set has embeddings, and it was not loaded.
    """
    if self._text is None:
      raise ValueError(f'{self.name} was built without a text encoder')
    return self._text

  def _stored_text(self, encoder: TextEncoder | None) -> Mapping | None:
    """What made the data set's embeddings; None if it has none.

    Raises:
      DataError: they are not those that the config describes, or only one of
        the splits has them.
    """
    header, config = self.source('train').text_header, self.config.text
    if header is None:
      return None
    wanted = {'max_len': config.max_len, 'dtype': config.dtype}
    folder = text_folder.find(config.path)
    if config.get('kind') is not None:
      wanted['kind'] = config.kind
    if encoder is not None:
      wanted['encoder'] = encoder.digest
    elif config.path and (folder / 'config.json').exists():
      wanted['mark'] = find_mark(folder, config.get('kind'))
    for split in 'train', 'eval':
      source = self.source(split)
      if source.text_header is None:
        raise DataError(
          'data.path has embeddings of its captions and data.eval_path has '
          'none; make them with imagen-embed, or set data.text=None.'
        )
      source.check_text(**wanted)
    return header

  def init(self, key: jax.Array) -> Tree:
    return stages.init_params(self.stage, key)

  def condition(self, key: jax.Array, batch: Tree, frozen: Tree) -> Tree:
    text, measured = batch.get('text'), {}
    if text is None:
      text, measured['text_buckets'] = encode_by_length(
        self.text.module, frozen, batch['ids'], batch['mask']
      )
    text = jax.lax.stop_gradient(text.astype(jnp.float32))
    made = {'image': batch['image'], 'text': text, 'mask': batch['mask']}
    made['measured'] = measured
    if self.stage.stratified:
      made['t'] = times(key, len(text), stratified=True)
    return made

  def loss(
    self, params: Tree, key: jax.Array, batch: Tree, frozen: Tree
  ) -> tuple[Array, dict]:
    arrays = batch['image'], batch['text'], batch['mask'], batch.get('t')
    return objective.loss(self.stage, params, key, *arrays)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape, length = jax.ShapeDtypeStruct, self.config.text.max_len
    side = self.stage.crop or self.resolution
    spec = {
      'image': shape((batch_size, side, side, 3), jnp.uint8),
      'mask': shape((batch_size, length), bool),
    }
    if self.cached_text:
      size = (batch_size, length, self.text_dim)
      return spec | {'text': shape(size, jnp.bfloat16)}
    return spec | {'ids': shape((batch_size, length), jnp.int32)}

  def frozen_spec(self) -> Tree:
    if self.cached_text:
      return {}
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.text.params
    )

  @functools.cached_property
  def spared_flops(self) -> list[float]:
    if self.cached_text:
      return []
    module, params = self.text.module, self.text.params

    def flops(length: int) -> float:
      shape = self.config.train.batch_size, length
      tokens = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, bool))
      encode = functools.partial(encode_tokens, module)
      return count_flops(jax.make_jaxpr(encode)(params, *tokens))

    *some, longest = map(flops, buckets(self.config.text.max_len))
    return [longest - each for each in (*some, longest)]

  def load_frozen(self) -> Tree:
    if self.cached_text:
      return {}
    params = self.text.params
    return jax.device_put(params, sharding.state_shardings(params, self.mesh))

  def start(self, shardings: Tree, init_from: StageRecord | None) -> Start:
    if init_from is None:
      return super().start(shardings, init_from)
    params = matching_params(init_from, stages.param_shapes(self.stage))
    origin = f'starts from the weights of {init_from.path}'
    return Start(jax.device_put(params, shardings), origin)

  def text_record(self) -> dict:
    if (header := self._header) is not None:
      kept = {key: header[key] for key in ('kind', 'dim', 'max_len', 'store')}
      return kept | {'digest': header['encoder']}
    return {
      'kind': self.text.kind,
      'dim': self.text.dim,
      'max_len': self.config.text.max_len,
      'digest': self.text.digest,
    }

  def augmentation(self, split: str) -> Augment | None:
    flipped = super().augmentation(split)
    if self.stage.crop is None:
      return flipped
    cut = functools.partial(crop, side=self.stage.crop, unit=self.stage.factor)
    if flipped is None:
      return cut
    return lambda example, rng: flipped(cut(example, rng), rng)

  def example(self, example: dict) -> dict:
    if self.cached_text:
      return {key: example[key] for key in ('image', 'text', 'mask')}
    ids, mask, _ = self.text.tokenize(
      [example['caption']], max_len=self.config.text.max_len
    )
    return {'image': example['image'], 'ids': ids[0], 'mask': mask[0]}

  def make_preview(self, frozen: Tree) -> Callable[[Tree], Preview | None]:
    config = self.stage.sampling

    def sample(params: Tree, given: dict, frozen: Tree) -> Array:
      del frozen
      inputs = sampling.SampleInputs(
        keys=jax.random.wrap_key_data(given['keys']),
        text=given['text'],
        mask=given['mask'],
        low_res=given.get('low'),
        guidance=config.scalars['guidance'],
        aug_level=config.scalars['aug_level'],
      )
      return sampling.sample(self.stage, params, config.spec, inputs)

    def embed(examples: list[dict]) -> dict:
      if self.cached_text:
        arrays = [_first_text(example) for example in examples]
        return {key: np.stack([a[key] for a in arrays]) for key in arrays[0]}
      captions = [example['caption'] for example in examples]
      text, mask = self.text.encode(captions, max_len=self.config.text.max_len)
      return {'text': text, 'mask': mask}

    rows = sharding.batch_sharding(self.mesh)
    return make_image_preview(
      self,
      jax.jit(
        sample,
        out_shardings=rows,
        compiler_options=compiler.sampling_options(),
      ),
      embed,
      frozen,
      low_resolution=self.stage.low_resolution,
    )

  @classmethod
  def export(cls, request: Export) -> str:
    return export_stage(request)


def _first_text(example: dict) -> dict[str, np.ndarray]:
  """The stored embedding of an example's first caption, in float32."""
  text, mask = (
    value[0] if isinstance(value, tuple) else value
    for value in (example['text'], example['mask'])
  )
  return {'text': text.astype(np.float32), 'mask': mask}


def _check_sampling(stage: stages.Stage) -> None:
  """Rejects defaults with which neither previews nor the model could sample.

  Raises:
    UsageError: naming the config's key.
  """
  try:
    settings.check(stage, stage.sampling)
  except UsageError as error:
    raise UsageError(
      str(error), key=f'config.stage.sampling.{error.key}'
    ) from error


def _check_buckets(
  stage: stages.Stage, shapes: Iterable[tuple[int, int]]
) -> None:
  """Rejects shapes of images that the network cannot take, or be cut out of.

  Raises:
    UsageError: naming the config's key.
  """
  factor = 1 if stage.low_resolution is None else stage.factor
  multiple = math.lcm(stage.net.multiple, factor)
  for height, width in shapes:
    if stage.crop is None and (height % multiple or width % multiple):
      raise UsageError(
        f'the data have images of {width} × {height} pixels, and the network '
        f'takes multiples of {multiple}; take data.aspect=crop, or a network '
        'with fewer levels.',
        key='config.data.aspect',
      )
    if stage.crop is not None and stage.crop > min(height, width):
      raise UsageError(
        f'stage.crop is {stage.crop}, and the data have images of {width} × '
        f'{height} pixels; take a smaller crop.',
        key='config.stage.crop',
      )


def _load_text(config: ConfigDict, mesh: Mesh | None) -> TextEncoder:
  # Sharded like the state: whole, T5-XXL does not fit on a device beside it.
  place = None
  if mesh is not None and mesh.shape['fsdp'] > 1:
    place = functools.partial(sharding.leaf_sharding, mesh=mesh)
  text = config.text
  return load_text_encoder(
    text_folder.existing(text.path, text.get('trained_by')),
    text.dtype,
    kind=text.get('kind'),
    max_len=text.max_len,
    place=place,
  )


def matching_params(record: StageRecord, spec: Tree) -> Tree:
  """A stage's EMA parameters, after checking that the network is the same.

  Args:
    record: the `StageRecord`.
    spec: shapes of this network's parameters.

  Raises:
    ModelError: it is another; the message names a parameter that differs.
  """
  params = model_folder.load_params(record)
  have, want = leaves.describe(params), leaves.describe(spec)
  advice = 'give a stage that was trained with this stage.net'
  leaves.check(record.path, have, want, advice)
  return params
