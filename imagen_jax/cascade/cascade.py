"""The cascade: prompts in, images out (Sections 2 and 4.1, Figure A.4).

A frozen text encoder, a base model, and super-resolution models, each of which
upsamples the previous stage's images. Only one of them is on the devices at a
time.
"""

import concurrent.futures
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from imagen_jax import sharding
from imagen_jax.cascade import (
  autoguidance,
  batching,
  conditioning,
  given_images,
  settings,
  stage_config,
)
from imagen_jax.cascade import preview as preview_lib
from imagen_jax.cascade.batching import Request
from imagen_jax.cascade.embedding import Embedding, check_kind, embed
from imagen_jax.cascade.preview import EVERY, Preview
from imagen_jax.cascade.sampling import SampleInputs
from imagen_jax.cascade.stage import SamplingConfig, Stage
from imagen_jax.cascade.stage_run import StageRun
from imagen_jax.dtypes import pinned, resolve_dtype
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import bucket, model_folder, paths, text_folder
from imagen_jax.io import images as image_io
from imagen_jax.nets.network import Network
from imagen_jax.typing import Image


def load(
  path: str | pathlib.Path | None = None,
  *,
  dtype: str = 'auto',
  stages: Sequence[str] | None = None,
  fsdp: int | None = None,
  devices: Sequence[jax.Device] | None = None,
  weak_model: str | pathlib.Path | None = None,
) -> 'Cascade':
  """Opens a model folder; weights are loaded when sampling.

  Args:
    path: a model folder (exported stages, or training workdirs, one directory
      each), or the name of a bundled model; None is the demo.
    dtype: of the activations, 'auto', 'float32' or 'bfloat16'.
    stages: names of the stages to use, in order; None is all of them.
    fsdp: devices over which one copy of a network is split; None is the fewest
      that hold it.
    devices: those to generate on. By default all of them, and every process
      then generates the same images.
    weak_model: a folder with weaker models of some of the stages, or of one,
      for `autoguidance`, such as an earlier checkpoint or a smaller network.

  Raises:
    ModelError: a folder is missing, incomplete or corrupted, or a stage does
      not upsample the images of the one before it or is not that of
      `weak_model`, or the folder's text encoder is of another kind.
    UsageError: a name in `stages` is unknown, or none is in `weak_model`.
  """
  path = paths.located(path)
  records = model_folder.find_stages(path, stages)
  made = Cascade(bucket.at(path), records, resolve_dtype(dtype), fsdp, devices)
  # Its weights are read when prompts are embedded, if they are.
  if text := text_folder.found(made.path, records[0]):
    check_kind(text, records[0])
  if weak_model is not None:
    weak_model = paths.user_path(weak_model)
    made.weak = autoguidance.find(weak_model, records, made.stages)
  return made


class Cascade:
  """The text encoder and the stages of a model folder, ready to sample.

  Attributes:
    path: the folder.
    stages: `Stage`s, in order.
    dtype: of the activations.
    weak: {stage name: (record, network)} of the weaker models.
  """

  def __init__(
    self,
    path: pathlib.PurePath,
    records: Sequence[model_folder.StageRecord],
    dtype: jax.typing.DTypeLike,
    fsdp: int | None = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    self.path = path
    self._mesh = functools.partial(
      sharding.sampling_mesh, fsdp=fsdp, devices=devices
    )
    self.dtype = jnp.dtype(dtype)
    self._records = records
    self.weak: dict[str, tuple[model_folder.StageRecord, Network]] = {}
    self.stages = [
      stage_config.from_record(record, dtype) for record in records
    ]
    texts = {(r.text['digest'], r.text['max_len']) for r in records}
    if len(texts) > 1:
      raise ModelError(
        f'the stages of {path} were trained with different text encoders '
        'or lengths; train them with the same text section.'
      )

  @functools.cached_property
  def digest(self) -> str:
    """sha256 over the stages' digests, 16 hex digits."""
    return model_folder.model_digest(self._records)

  @functools.cached_property
  def weak_digest(self) -> str | None:
    """The same of the weaker models; None without any."""
    weak = [record for record, _ in self.weak.values()]
    return model_folder.model_digest(weak) if weak else None

  @property
  def data_kinds(self) -> set[str]:
    """The `data.kind`s that its stages were trained on."""
    return {record.config['data']['kind'] for record in self._records}

  @property
  def multiple(self) -> int:
    """What the sides of the first stage's images must be multiples of.

    If it upsamples, of the low-resolution images; then every stage can
    generate images of their shape.
    """
    side = self.stages[0].low_resolution or self.stages[0].resolution
    factors = [(s.net.multiple, s.resolution // side) for s in self.stages]
    return math.lcm(*(m // math.gcd(m, factor) for m, factor in factors))

  def shape_for(self, image: PIL.Image.Image) -> tuple[int, int]:
    """(width, height) of the first stage's images if they start from `image`.

    The closest aspect ratio that every stage can generate.
    """
    side = self.stages[0].resolution
    return image_io.shaped(*image.size, side, self.multiple)

  @pinned()
  def embed(
    self, prompts: Sequence[str], negative_prompt: str = ''
  ) -> Embedding:
    """Encodes prompts; the text encoder is loaded for this call only.

    Raises:
      ModelError: the text encoder is missing, or not the one that the stages
        were trained with.
    """
    return embed(
      self.path,
      self._records[0],
      prompts,
      negative_prompt,
      mesh_for=self._mesh,
    )

  def settings(self, **choices: Any) -> list[SamplingConfig]:
    """The sampling settings of every stage, see `settings.choose`."""
    configs = settings.choose(self.stages, choices)
    for stage, config in zip(self.stages, configs):
      if config.autoguidance != 1 and stage.name not in self.weak:
        raise UsageError(
          f'stage {stage.name}: autoguidance {config.autoguidance:g} needs a '
          'weaker model of this stage; give one as weak_model, or use 1.',
          key='autoguidance',
        )
    return configs

  @pinned()
  def sample(
    self,
    prompts: str | Sequence[str] | Embedding,
    *,
    seed: int = 0,
    num_images: int = 1,
    indices: Sequence[int] | None = None,
    negative_prompt: str = '',
    low_res: np.ndarray | None = None,
    image: PIL.Image.Image | None = None,
    mask: PIL.Image.Image | None = None,
    batch_size: int | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    finished: Callable[[int, np.ndarray], None] | None = None,
    preview: Callable[[Preview], None] | None = None,
    every: int = EVERY,
    **choices: Any,
  ) -> dict[str, np.ndarray]:
    """Samples images from prompts.

    Image i of a prompt depends on (seed, prompt, i) and the settings, not on
    what else is generated.

    Args:
      prompts: strings, or their `Embedding`. An empty string is unconditional:
        without a negative prompt, guidance has no effect on it.
      seed: in [0, 2³²).
      num_images: images of each prompt.
      indices: which of them, instead of 0 … num_images − 1.
      negative_prompt: what guidance steers away from, in place of the null
        condition; an `Embedding` has its own.
      low_res: uint8 [N, h, w, 3], the images to upsample if the first stage is
        not a base model; one per image, or one for all.
      image: an image of any shape to start from, see `SamplerSpec.strength`,
        or to inpaint; cropped to a shape that the networks can generate.
      mask: of the same shape, white where to inpaint; elsewhere every stage
        keeps `image`, resized, bit for bit.
      batch_size: images per batch; None: all of them, at most 4.
      callback: called as callback(stage_name, done, total) after each batch.
      finished: called as finished(i, images) with images i, i + 1, … of the
        result, uint8 [n, H, W, 3], as soon as they are finished.
      preview: called with a `Preview` after every `every` steps of each batch
        of each stage, and with the result; it changes no image.
      every: steps.
      **choices: fields of `SamplingConfig` (sampler, steps, guidance, …), one
        value or a list with one per stage.

    Returns:
      {stage name: uint8 [N, H, W, 3]}, in the order of the stages; the images
      of a prompt are consecutive.

    Raises:
      UsageError, ModelError: as `settings`, `embed` and `load`.
      NumericError: an image is NaN or Inf.
    """
    configs = self.settings(**choices)
    embedding = None
    if isinstance(prompts, Embedding):
      embedding, prompts = prompts, prompts.prompts
      negative_prompt = negative_prompt or embedding.negative_prompt
      if negative_prompt != embedding.negative_prompt:
        raise UsageError(
          'negative_prompt is not that of the embedding; give it to `embed`.',
          key='negative_prompt',
        )
    settings.check_negative(configs, negative_prompt)
    request = Request(
      prompts=(prompts,) if isinstance(prompts, str) else tuple(prompts),
      seed=seed,
      indices=tuple(range(num_images) if indices is None else indices),
      batch_size=batch_size,
      callback=callback,
      preview=preview,
      every=every,
    )
    first = self.stages[0]
    image, mask = given_images.upright(image, mask)
    given_images.check_images(
      first.name,
      first.low_resolution is not None,
      low_res=low_res,
      image=image,
      mask=mask,
      strength=choices.get('strength'),
    )
    low = None if low_res is None else _from_uint8(low_res, len(request.rows))
    if embedding is None:
      embedding = self.embed(request.prompts, negative_prompt)
    sizes, runs = self._sizes(image, low), self._runs(configs)

    def inputs(i: int, low: Image | None) -> Callable[..., SampleInputs]:
      rule = self._records[i].config['data']['resize']
      start = given_images.start_from(image, mask, *sizes[i], resize=rule)
      return _stage_inputs(self.stages[i], request, embedding, low, start)

    def prepare(i: int) -> None:
      width, height = sizes[i - 1]
      shape = (len(request.rows), height, width, 3)
      runs[i].prepare(request, inputs(i, np.broadcast_to(np.float32(0), shape)))

    results = {}
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
      for i in range(1, len(runs)):
        pool.submit(prepare, i)
      for i, run in enumerate(runs):
        last = finished if run is runs[-1] else None
        low = run.generate(
          dataclasses.replace(request, finished=last), inputs(i, low)
        )
        results[run.stage.name] = conditioning.to_uint8(low)
    finally:
      pool.shutdown(cancel_futures=True)
    if preview is not None:
      name, steps = run.stage.name, run.num_steps(from_image=image is not None)
      images = results[name]
      preview(Preview(name, 0, steps, steps, images, images, results))
    return results

  def stream(
    self,
    prompts: str | Sequence[str] | Embedding,
    *,
    every: int = EVERY,
    **call: Any,
  ) -> Iterator[Preview]:
    """Samples images and yields them while they become visible.

    The last preview has the `images` that `sample` returns for the same
    arguments, bit for bit. Sampling is at most one preview ahead, in a thread
    of its own; closing the iterator ends it there and waits for that.

    Args:
      prompts: as of `sample`.
      every: steps between two previews.
      **call: arguments of `sample`.

    Raises:
      ImagenError: as `sample`, at the first or a later preview.
    """
    work = lambda emit: self.sample(prompts, preview=emit, every=every, **call)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      yield from preview_lib.stream(work, pool)

  def _sizes(
    self, image: PIL.Image.Image | None, low: Image | None
  ) -> list[tuple[int, int]]:
    """(width, height) of every stage's images.

    Raises:
      UsageError: a stage cannot generate images of that shape.
    """
    sizes: list[tuple[int, int]] = []
    for stage in self.stages:
      size = stage.resolution, stage.resolution
      if sizes:
        size = sizes[-1][0] * stage.factor, sizes[-1][1] * stage.factor
      elif low is not None:
        size = low.shape[2] * stage.factor, low.shape[1] * stage.factor
      elif image is not None:
        size = self.shape_for(image)
      given_images.check_size(stage.name, *size, stage.net.multiple)
      sizes.append(size)
    return sizes

  def _runs(self, configs: Sequence[SamplingConfig]) -> list[StageRun]:
    """Every stage with its settings."""
    parts = zip(self.stages, self._records, configs)
    return [
      StageRun(
        stage,
        record,
        config,
        self._mesh,
        self.weak[stage.name] if config.autoguidance != 1 else None,
      )
      for stage, record, config in parts
    ]


def _from_uint8(low_res: np.ndarray, count: int) -> np.ndarray:
  low = np.asarray(low_res, np.float32) / 127.5 - 1
  if len(low) not in (1, count):
    raise UsageError(
      f'there are {len(low)} low-resolution images for {count} images; give '
      'one, or one for each.',
      key='low_res',
    )
  return np.broadcast_to(low, (count, *low.shape[1:]))


def _stage_inputs(
  stage: Stage,
  request: Request,
  embedding: Embedding,
  low: Image | None,
  start: dict[str, np.ndarray],
) -> Callable[[np.ndarray], SampleInputs]:
  """A function, indices of rows -> `SampleInputs` without the scalars."""
  # An empty prompt is the null condition: both branches are then equal.
  empty = np.array([not prompt.strip() for prompt in embedding.prompts])
  text = np.where(empty[:, None, None], 0, embedding.text)
  mask = embedding.mask & ~empty[:, None]
  shared = dict(start)
  if embedding.negative is not None:
    shared['negative'], shared['negative_mask'] = embedding.negative

  def inputs(rows: np.ndarray) -> SampleInputs:
    prompts = np.array([request.rows[row][0] for row in rows])
    rest: dict[str, Any] = batching.repeated(shared, len(rows))
    return SampleInputs(
      keys=request.key_data(rows, stage.resolution),
      text=text[prompts],
      mask=mask[prompts],
      low_res=None if low is None else low[rows],
      **rest,
    )

  return inputs
