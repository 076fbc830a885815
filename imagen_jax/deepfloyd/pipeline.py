"""DeepFloyd IF from prompts to images: T5, stage I, stage II, one at a time.

`IF.sample` covers text to image, image to image, inpainting, upsampling of a
given image, and IF's style transfer; its arguments select the task.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from imagen_jax import sharding
from imagen_jax.cascade import batching, given_images
from imagen_jax.cascade.batching import Request
from imagen_jax.deepfloyd import settings, stage, text, weights
from imagen_jax.deepfloyd.settings import Settings
from imagen_jax.deepfloyd.stage import SampleInputs, Stage
from imagen_jax.deepfloyd.unet import IFUNet
from imagen_jax.dtypes import pinned, resolve_dtype
from imagen_jax.errors import ModelError, UsageError, check_choice
from imagen_jax.io import files
from imagen_jax.io import images as image_io
from imagen_jax.io.paths import user_path
from imagen_jax.typing import Image


def _stage_folders(path: pathlib.Path) -> list[pathlib.Path]:
  places = [path]
  if path.is_dir():
    folders = (p for p in path.iterdir() if p.is_dir())
    places += sorted(p for p in folders if not files.is_hidden(p.name))
  return [p for p in places if (p / 'unet' / 'config.json').exists()]


def load(
  path: str | pathlib.Path,
  *,
  dtype: str = 'auto',
  stages: Sequence[str] | None = None,
  fsdp: int | None = None,
  cache: str | pathlib.Path | None = None,
) -> 'IF':
  """Opens IF: reads the configs now, the weights when sampling.

  Args:
    path: a stage's folder as downloaded (`model_index.json`, `unet/`,
      `scheduler/`, …), or a folder of several such as IF-I-XL-v1.0 and
      IF-II-L-v1.0.
    dtype: of activations and weights, 'auto', 'float32' or 'bfloat16'.
    stages: names of the folders to use; all by default.
    fsdp: devices that share one copy of a network; None: as few as can hold it.
    cache: a directory of embeddings, see `text.embed`.

  Raises:
    ModelError: there is no stage, or the stages do not form a cascade.
    UsageError: a name is unknown.
  """
  path = pathlib.Path(user_path(path))
  found = [stage.read(folder) for folder in _stage_folders(path)]
  if not found:
    raise ModelError(
      f'{path} holds no DeepFloyd IF stage: no unet/config.json in it or one '
      'level below; give the folder that was downloaded.'
    )
  found.sort(key=lambda s: (s.upsamples, s.resolution))
  if stages is not None:
    names = [s.name for s in found]
    for name in stages:
      check_choice(f'a stage of {path}', name, names, key='stages')
    found = [s for s in found if s.name in stages]
  for lower, upper in zip(found, found[1:]):
    if not upper.upsamples or upper.resolution <= lower.resolution:
      raise ModelError(
        f'{lower.name} and {upper.name} in {path} do the same thing; choose '
        'one of them as the stages to use.'
      )
  return IF(path, found, resolve_dtype(dtype), fsdp, cache)


class IF:
  """A DeepFloyd IF model.

  Attributes:
    path: its folder.
    stages: `stage.Stage`s, the lowest resolution first.
    dtype: of activations and weights.
    cache: the directory of embeddings, or None.
  """

  def __init__(
    self,
    path: pathlib.Path,
    stages: Sequence[Stage],
    dtype: jax.typing.DTypeLike,
    fsdp: int | None = None,
    cache: str | pathlib.Path | None = None,
  ):
    self.path = path
    self.cache = cache
    self.stages = stages
    self.dtype = jnp.dtype(dtype)
    self._mesh = functools.partial(sharding.sampling_mesh, fsdp=fsdp)

  def settings(self, task: str, **choices: Any) -> list[Settings]:
    """`Settings` of every stage: the task's defaults, overridden by `choices`.

    Args:
      task: 'text', 'image' or 'mask'.
      **choices: one value, or a list with one per stage; None keeps the
        default.

    Raises:
      UsageError: a list has the wrong length, or a value is invalid.
    """
    return settings.choose(self.stages, task, choices)

  def shape_for(
    self,
    image: PIL.Image.Image | None = None,
    low_res: PIL.Image.Image | None = None,
  ) -> tuple[int, int]:
    """(width, height) to which a given image is cropped and resized.

    As in IF, sides of `low_res` are multiples of 8 pixels, those of the first
    stage's images that start from `image` too.
    """
    if low_res is not None:
      return max(low_res.width // 8, 1) * 8, max(low_res.height // 8, 1) * 8
    assert image is not None
    return image_io.shaped(*image.size, self.stages[0].resolution)

  @pinned()
  def embed(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """{prompt: [77, D]}; T5 is freed afterwards. See `text.embed`."""
    prompts = list(dict.fromkeys(prompts))
    chosen = [part.folder for part in self.stages]
    folders = dict.fromkeys([self.path, *chosen, *_stage_folders(self.path)])
    folder, dtype = text.find(folders), self.dtype.name
    made = text.embed(prompts, folder, dtype=dtype, cache=self.cache)
    return dict(zip(prompts, made))

  @pinned()
  def sample(
    self,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    num_images: int = 1,
    negative_prompt: str = '',
    style_prompt: str | None = None,
    low_res: PIL.Image.Image | None = None,
    image: PIL.Image.Image | None = None,
    mask: PIL.Image.Image | None = None,
    aspect: tuple[int, int] = (1, 1),
    batch_size: int | None = None,
    callback: Callable[[str, int, int], None] | None = None,
    finished: Callable[[int, np.ndarray], None] | None = None,
    **choices: Any,
  ) -> dict[str, np.ndarray]:
    """Samples images for prompts.

    Image i of a prompt depends on (seed, prompt, i) and the settings only.

    Args:
      prompts: a string or a list of them.
      seed: in [0, 2³²).
      num_images: images per prompt.
      negative_prompt: replaces the empty prompt in guidance.
      style_prompt: its pooled text is added to the time embedding, and its
        prediction is mixed in by `style_fraction`, as in IF's dream and style
        transfer.
      low_res: the image to upsample if the first stage upsamples, cropped to
        multiples of 8 pixels.
      image: an image to start from (`strength`), or to inpaint; cropped to a
        shape that the networks can generate.
      mask: of the same shape, white where to inpaint; the rest is kept
        bit-equal.
      aspect: (width, height), without `image` or `low_res`.
      batch_size: images per batch, at most 4 by default.
      callback: called with (stage name, images done, total images).
      finished: called as finished(i, images) with images i, i + 1, … of the
        result, uint8 [n, H, W, 3], as soon as they are finished.
      **choices: fields of `Settings`.

    Returns:
      {stage name: float32 [N, H, W, 3] in [−1, 1]}; images of one prompt are
      consecutive.

    Raises:
      UsageError, ModelError: see `settings`, `embed` and `Stage.load`.
      NumericError: an image is NaN or Inf.
    """
    task = 'text' if image is None else 'image' if mask is None else 'mask'
    chosen = self.settings(task, **choices)
    request = Request(
      prompts=(prompts,) if isinstance(prompts, str) else tuple(prompts),
      seed=seed,
      indices=tuple(range(num_images)),
      batch_size=batch_size,
      callback=callback,
    )
    first = self.stages[0]
    image, mask = given_images.upright(image, mask)
    given_images.check_images(
      first.name,
      first.upsamples,
      low_res=low_res,
      image=image,
      mask=mask,
      strength=choices.get('strength'),
    )
    _check_effects(chosen, choices, negative_prompt, style_prompt)
    low = None
    if low_res is not None:
      low_res = image_io.upright(low_res)
      low = image_io.to_float(low_res, *self.shape_for(low_res=low_res))
      low = np.broadcast_to(low, (len(request.rows), *low.shape))
    styles = [] if style_prompt is None else [style_prompt]
    texts = self.embed([*request.prompts, negative_prompt, *styles])
    results = {}
    for part, setting in zip(self.stages, chosen):
      if part is self.stages[-1]:
        request = dataclasses.replace(request, finished=finished)
      width, height = _size(part, low, image, aspect)
      shared = given_images.start_from(image, mask, width, height)
      if setting.guidance > 1:
        shared['uncond'] = texts[negative_prompt]
      if style_prompt is not None:
        shared['pooled'] = shared['mixed'] = texts[style_prompt]
      inputs = _stage_inputs(part, request, texts, low, shared)
      shape = (height, width, 3)
      run = functools.partial(
        _generate, stage.jitted(), part, setting, shape=shape
      )
      low = self._run_stage(part, request, inputs, run)
      results[part.name] = low
    return results

  def _run_stage(
    self,
    part: Stage,
    request: Request,
    inputs: Callable[[np.ndarray], SampleInputs],
    run: Callable[..., jax.Array],
  ) -> np.ndarray:
    """Samples all rows with one stage: float32 [N, H, W, 3] in [−1, 1]."""
    folder = part.folder / 'unet'
    mesh = self._mesh(weights.num_bytes(folder))
    module, params = weights.load(
      folder,
      dtype=self.dtype,
      weights_dtype=self.dtype,
      place=functools.partial(sharding.leaf_sharding, mesh=mesh),
    )
    finite = functools.partial(run, module, params, finite=True)

    def sample(arrays: SampleInputs) -> Iterator[batching.Partial]:
      images = run(module, params, arrays)
      yield 1, 1, images, images

    images = batching.generate(request, part.name, mesh, inputs, sample, finite)
    batching.free(params)
    return images


def _check_effects(
  chosen: Sequence[Settings],
  choices: Mapping[str, Any],
  negative_prompt: str,
  style_prompt: str | None,
) -> None:
  """Rejects prompts and choices that have no effect on any stage."""
  if style_prompt is None and choices.get('style_fraction') is not None:
    raise UsageError(
      'style_fraction has no effect without a style prompt.',
      key='style_fraction',
    )
  if negative_prompt and all(setting.guidance <= 1 for setting in chosen):
    raise UsageError(
      'the negative prompt has no effect without guidance above 1.',
      key='negative_prompt',
    )


def _generate(
  call: Callable[..., Any],
  part: Stage,
  setting: Settings,
  module: IFUNet,
  params: dict,
  inputs: SampleInputs,
  *,
  shape: tuple[int, int, int],
  finite: bool = False,
) -> jax.Array:
  """`call` of `stage.generate`, with the settings' scalars in `inputs`."""
  made = part.schedule
  if module.config.out_channels == 3:  # no variance channels
    made = dataclasses.replace(made, variance_type='fixed_small')
  plan = settings.plan(part, setting, inputs.image is not None)
  inputs = inputs._replace(**settings.scalars(part, setting))
  return call(
    params,
    inputs,
    plan,
    module=module,
    made=made,
    shape=shape,
    finite=finite,
  )


def _size(
  part: Stage,
  low: np.ndarray | None,
  image: PIL.Image.Image | None,
  aspect: tuple[int, int],
) -> tuple[int, int]:
  """(width, height) of a stage's images."""
  if low is not None:
    # As in IF: four times the input, rounded down to a multiple of 32 pixels.
    height, width = (side * 4 // 32 * 32 for side in low.shape[1:3])
  elif image is not None:
    width, height = image_io.shaped(*image.size, part.resolution)
  else:
    width, height = image_io.shaped(*aspect, part.resolution)
  given_images.check_size(part.name, width, height, part.config.multiple)
  return width, height


def _stage_inputs(
  part: Stage,
  request: Request,
  texts: Mapping[str, np.ndarray],
  low: np.ndarray | None,
  shared: Mapping[str, np.ndarray],
) -> Callable[[np.ndarray], SampleInputs]:
  """A function: row indices -> `SampleInputs` on the host, without scalars."""

  def inputs(rows: np.ndarray) -> SampleInputs:
    prompts = [request.prompts[request.rows[row][0]] for row in rows]
    return SampleInputs(
      keys=request.key_data(rows, part.resolution),
      text=np.stack([texts[prompt] for prompt in prompts]),
      low_res=None if low is None else low[rows],
      **batching.repeated(shared, len(rows)),
    )

  return inputs


def previewer(
  part: Stage, module: IFUNet, shape: tuple[int, int, int]
) -> Callable[[dict, dict, jax.Array], Image]:
  """Returns a function that samples with a stage's default settings.

  Args:
    part: the stage.
    module: its network, possibly without the variance channels.
    shape: (H, W, 3).

  Returns:
    (params, arrays on a mesh, empty prompt [L, D]) -> [B, H, W, 3]; the arrays
    are `keys` (key data) [B, 2], `text` [B, L, D] and, for a super-resolution
    stage, `low` [B, h, w, 3].
  """
  (setting,) = settings.choose([part], 'text', {})

  def generate(params: dict, arrays: dict, empty: jax.Array) -> Image:
    inputs = SampleInputs(
      keys=arrays['keys'],
      text=arrays['text'],
      uncond=jnp.broadcast_to(empty, arrays['text'].shape),
      low_res=arrays.get('low'),
    )
    return _generate(
      stage.generate, part, setting, module, params, inputs, shape=shape
    )

  return generate
