"""DeepFloyd IF from prompts to images: T5, stage I, stage II, one at a time.

Text to image, image to image, inpainting, upsampling an image of one's own,
and IF's style transfer are one function with more or fewer arguments: a
image to start from, a mask, a second prompt.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax.deepfloyd import (
  schedule,
  settings,
  stage,
  text,
  weights,
)
from imagen_jax.diffusion.samplers import image_key
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import images as image_io


def _stage_folders(path):
  places = [path]
  if path.is_dir():
    places += sorted(p for p in path.iterdir() if p.is_dir())
  return [p for p in places if (p / 'unet' / 'config.json').exists()]


def load(path, *, dtype='auto', stages=None, fsdp=None):
  """Opens IF: the configs now, the weights when generating.

  Args:
    path: a stage's folder as downloaded (`model_index.json`, `unet/`,
      `scheduler/`, …), or a folder of several such as IF-I-XL-v1.0 and
      IF-II-L-v1.0.
    dtype: of activations and weights, 'auto', 'float32' or 'bfloat16'.
    stages: names of the folders to use; all by default.
    fsdp: devices that share one copy of a network; None: as few as hold it.

  Raises:
    ModelError: there is no stage, or they do not follow one another.
    UsageError: a name is unknown.
  """
  path = pathlib.Path(path)
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
      if name not in names:
        raise UsageError(
          f'{path} has no stage {name!r}; it has {", ".join(names)}.'
        )
    found = [s for s in found if s.name in stages]
  for lower, upper in zip(found, found[1:]):
    if not upper.upsamples or upper.resolution <= lower.resolution:
      raise ModelError(
        f'{lower.name} and {upper.name} in {path} do the same thing; choose '
        'one of them with --stages.'
      )
  return IF(path, found, resolve_dtype(dtype), fsdp)


class IF:
  """A DeepFloyd IF model that can be sampled.

  Attributes:
    path: its folder.
    stages: `stage.Stage`s, the lowest resolution first.
    dtype: of activations and weights.
  """

  def __init__(self, path, stages, dtype, fsdp):
    self.path = path
    self.stages = stages
    self.dtype = jnp.dtype(dtype)
    self._mesh = functools.partial(sharding.sampling_mesh, fsdp=fsdp)

  def settings(self, task, **choices):
    """`Settings` of every stage: the task's defaults, changed by `choices`.

    Args:
      task: 'text', 'image' or 'mask'.
      **choices: one value, or a list with one per stage; None changes
        nothing.

    Raises:
      UsageError: a list of another length, or a value that cannot work.
    """
    return settings.choose(self.stages, task, choices)

  def embed(self, prompts, *, cache=None):
    """{prompt: [77, D]}; T5 leaves the device afterwards. See `text.embed`."""
    prompts = list(dict.fromkeys(prompts))
    folders = [self.path, *(s.folder for s in self.stages)]
    siblings = [f for f in _stage_folders(self.path) if f not in folders]
    made = text.embed(
      prompts,
      text.find([*folders, *siblings]),
      dtype=self.dtype.name,
      cache=cache,
    )
    return dict(zip(prompts, made))

  def sample(
    self,
    prompts,
    *,
    seed=0,
    num_images=1,
    negative_prompt='',
    style_prompt=None,
    low_res=None,
    image=None,
    mask=None,
    aspect=(1, 1),
    cache=None,
    batch_size=None,
    callback=None,
    **choices,
  ):
    """Generates images of prompts.

    Image i of a prompt depends on (seed, prompt, i) and the settings, not
    on what else is generated.

    Args:
      prompts: a string or a list of them.
      seed: in [0, 2³²).
      num_images: images per prompt.
      negative_prompt: what guidance steers away from, in place of nothing.
      style_prompt: its pooled text is used for the time embedding, and its
        prediction is mixed in by `mixer`: IF's dream and style transfer.
      low_res: a PIL image for a first stage that upsamples.
      image: a PIL image to start from (`strength`), or to repaint.
      mask: a PIL image of the same shape, white where to repaint; the rest
        is kept to the bit.
      aspect: (width, height), without `image` or `low_res`.
      cache: a directory of embeddings, see `text.embed`.
      batch_size: images at a time, 4 at most by default.
      callback: called with (stage's name, images done, images in all).
      **choices: fields of `Settings`.

    Returns:
      {stage's name: float32 [N, H, W, 3] in [−1, 1]}; images of one prompt
      stand together.

    Raises:
      UsageError, ModelError: see `settings`, `embed` and `Stage.load`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    task = 'text' if image is None else 'image' if mask is None else 'mask'
    chosen = self.settings(task, **choices)
    image_io.check_pair(image, mask)
    if not 0 <= seed < 2**32:
      raise UsageError(f'seed is {seed}; it lies in 0 … 2³² − 1.')
    rows = [(p, i) for p in prompts for i in range(num_images)]
    if not rows:
      raise UsageError(
        'there is nothing to generate: give a prompt, and num_images ≥ 1.'
      )
    low = self._first_input(low_res, len(rows))
    wanted = [*prompts, negative_prompt]
    wanted += [style_prompt] if style_prompt is not None else []
    texts = self.embed(wanted, cache=cache)
    results = {}
    for part, setting in zip(self.stages, chosen):
      shape = self._shape(part, low, image, aspect)
      rest = {
        'image': image and image_io.to_float(image, shape[1], shape[0]),
        'mask': mask and image_io.to_mask(mask, shape[1], shape[0]),
        'style': None if style_prompt is None else texts[style_prompt],
        'uncond': texts[negative_prompt],
      }
      low = self._run_stage(
        part,
        setting,
        [(texts[p], image_key(seed, p, i)) for p, i in rows],
        low,
        rest,
        shape,
        batch_size or min(4, len(rows)),
        callback,
      )
      results[part.name] = low
    return results

  def _first_input(self, low_res, count):
    first = self.stages[0]
    if not first.upsamples:
      if low_res is not None:
        raise UsageError(
          f'stage {first.name} generates from text alone and takes no '
          'low-resolution image; choose a later stage with --stages.'
        )
      return None
    if low_res is None:
      raise UsageError(
        f'stage {first.name} upsamples images: give it one with --low_res, '
        'or add a first stage.'
      )
    low = image_io.to_float(low_res, *low_res.size)
    return np.broadcast_to(low, (count, *low.shape))

  def _shape(self, part, low, image, aspect):
    """(H, W, 3) of what a stage generates."""
    if image is not None:
      width, height = image_io.shaped(*image.size, part.resolution)
    elif low is not None:
      # As IF: four times what came in, in whole units of 32 pixels.
      height, width = (side * 4 // 32 * 32 for side in low.shape[1:3])
    else:
      width, height = image_io.shaped(*aspect, part.resolution)
    multiple = part.config.multiple
    if height < multiple or height % multiple or width % multiple or not width:
      raise UsageError(
        f'stage {part.name} cannot generate {width}×{height} pixels: it takes '
        f'multiples of {multiple}; crop the image or change the aspect '
        'ratio.'
      )
    return height, width, 3

  def _run_stage(self, part, setting, rows, low, rest, shape, batch, callback):
    """One stage for every row, `batch` rows at a time, the last one padded."""
    plan = schedule.plan(
      part.schedule,
      settings.steps_of(part, setting, rest['image'] is not None),
      setting.sampler,
    )
    size = weights.num_bytes(part.folder / 'unet')
    mesh = self._mesh(size)
    batch = -(-batch // mesh.size) * mesh.size
    module, params = part.load(
      dtype=self.dtype,
      weights_dtype=self.dtype,
      place=functools.partial(sharding.leaf_sharding, mesh=mesh),
    )
    scalars = {'weight': np.float32(setting.guidance)}
    if low is not None:
      level = min(round(setting.aug_level * 1000), 999)
      scalars |= stage.noise_terms(part.noising, level)
    if rest['style'] is not None:
      scalars['mixer'] = np.float32(setting.mixer)
    generated = []
    for start in range(0, len(rows), batch):
      chosen = rows[start : start + batch]
      padded = chosen + [chosen[-1]] * (batch - len(chosen))
      arrays = {'text': np.stack([emb for emb, _ in padded])}
      every = lambda x: np.broadcast_to(x, (batch, *x.shape))
      if setting.guidance > 1:
        arrays['uncond'] = every(rest['uncond'])
      for name in ('image', 'mask'):
        if rest[name] is not None:
          arrays[name] = every(rest[name])
      if rest['style'] is not None:
        arrays['pooled'] = arrays['mixed'] = every(rest['style'])
      if low is not None:
        lows = low[start : start + batch]
        fill = np.repeat(lows[-1:], batch - len(lows), axis=0)
        arrays['low'] = np.concatenate([lows, fill])
      keys = [jax.random.fold_in(key, part.resolution) for _, key in padded]
      arrays['keys'] = np.stack(
        [np.asarray(jax.random.key_data(k)) for k in keys]
      )
      arrays = sharding.put_whole_batch(arrays, mesh)
      keys = arrays.pop('keys')
      with jax.set_mesh(mesh):
        out = stage.generate(
          params,
          plan,
          stage.Given(**arrays, **scalars),
          keys,
          module=module,
          made=part.schedule,
          shape=shape,
        )
      generated.append(np.asarray(out)[: len(chosen)])
      if callback is not None:
        callback(part.name, start + len(chosen), len(rows))
    jax.tree.map(lambda leaf: leaf.delete(), params)
    return np.concatenate(generated)


def previewer(part, module, shape):
  """A function that generates as a stage does when not told how.

  Args:
    part: the `stage.Stage`.
    module: its network, perhaps without the variance.
    shape: (H, W, 3).

  Returns:
    (params, arrays on a mesh, empty prompt [L, D]) -> [B, H, W, 3]; the arrays
    are `keys` (key data) [B, 2], `text` [B, L, D] and, of a super-resolution
    stage, `low` [B, h, w, 3].
  """
  (setting,) = settings.choose([part], 'text', {})
  made = part.schedule
  if module.config.out_channels == 3:
    made = dataclasses.replace(made, variance_type='fixed_small')
  plan = schedule.plan(
    made, settings.steps_of(part, setting, False), setting.sampler
  )
  scalars = {'weight': np.float32(setting.guidance)}
  if part.upsamples:
    scalars |= stage.noise_terms(part.noising, round(setting.aug_level * 1000))

  def generate(params, arrays, empty):
    arrays = dict(arrays)
    keys = arrays.pop('keys')
    empty = jnp.broadcast_to(empty, arrays['text'].shape)
    given = stage.Given(**arrays, uncond=empty, **scalars)
    return stage.generate(
      params, plan, given, keys, module=module, made=made, shape=shape
    )

  return generate
