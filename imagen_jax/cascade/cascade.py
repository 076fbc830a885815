"""The cascade: prompts in, images out (Sections 2 and 4.1, Figure A.4).

A frozen text encoder, a base model, and super-resolution models, each of which
upsamples what the one before it drew. Only one of them is on the device at a
time: the text encoder leaves before the base model comes.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax.cascade import conditioning, sampling
from imagen_jax.cascade import stage as stages
from imagen_jax.diffusion.samplers import image_key
from imagen_jax.dtypes import resolve_dtype
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import images as image_io
from imagen_jax.io import model_folder
from imagen_jax.text.encoder import load_text_encoder


def load(path=None, *, dtype='auto', stages=None, fsdp=None, devices=None):
  """Opens a model: its stages' shapes now, their weights when sampling.

  Args:
    path: a model folder (exported stages, or training workdirs, one directory
      each); None is the bundled demo model.
    dtype: activations' type, 'auto', 'float32' or 'bfloat16'.
    stages: names of the stages to use, in order; None is all of them.
    fsdp: devices over which one copy of a network is split; None is the least
      that holds it.
    devices: those to generate on, all of them by default; of several processes
      each then generates the same images.

  Returns:
    a `Cascade`.

  Raises:
    ModelError: the folder is missing, incomplete, corrupted, or its stages do
      not follow one another.
    UsageError: a name in `stages` is unknown.
  """
  path = model_folder.demo_path() if path is None else pathlib.Path(path)
  records = model_folder.find_stages(path, stages)
  return Cascade(path, records, resolve_dtype(dtype), fsdp, devices)


@dataclasses.dataclass(frozen=True)
class Embedding:
  """Prompts as the text encoder sees them.

  Attributes:
    prompts: the strings.
    text: float32 [N, L, D], zeros beyond each prompt's end.
    mask: bool [N, L].
    cut: how many tokens of each prompt did not fit.
  """

  prompts: tuple[str, ...]
  text: np.ndarray
  mask: np.ndarray
  cut: tuple[int, ...]


class Cascade:
  """A model folder that can be sampled.

  Attributes:
    path: the folder.
    stages: `Stage`s, in order.
    digest: one string for all the weights, recorded in every image.
  """

  def __init__(self, path, records, dtype, fsdp=None, devices=None):
    self.path = path
    self._mesh = functools.partial(
      sharding.sampling_mesh, fsdp=fsdp, devices=devices
    )
    self.dtype = jnp.dtype(dtype)
    self._records = records
    self.stages = [
      stages.from_config(
        record.config['stage'],
        text_dim=record.text['dim'],
        text_len=record.text['max_len'],
        dtype=dtype,
      )
      for record in records
    ]
    texts = {(r.text['digest'], r.text['max_len']) for r in records}
    if len(texts) > 1:
      raise ModelError(
        f'the stages of {path} were trained with different text encoders '
        'or lengths; train them with the same text section.'
      )

  @functools.cached_property
  def digest(self):
    """sha256 over the stages' digests, 16 hex digits."""
    return model_folder.model_digest(self._records)

  @property
  def trained_on_shapes(self):
    """Whether the model knows the words of the shapes world only."""
    return all(r.config['data']['kind'] == 'shapes' for r in self._records)

  def embed(self, prompts):
    """Encodes prompts; the text encoder leaves the device afterwards.

    Args:
      prompts: a list of strings.

    Raises:
      ModelError: the text encoder is missing, or not the one that the stages
        were trained with.
    """
    record = self._records[0]
    path = model_folder.text_path(self.path, record)
    size = sum(file.stat().st_size for file in path.glob('*.safetensors'))
    mesh = self._mesh(size)
    encoder = load_text_encoder(
      path,
      self.dtype.name,
      place=functools.partial(sharding.leaf_sharding, mesh=mesh)
      if mesh.shape['fsdp'] > 1
      else None,
    )
    if encoder.digest != record.text['digest']:
      raise ModelError(
        f'the text encoder in {path} is not the one that stage '
        f'{record.name} was trained with; put that one there.'
      )
    length = record.text['max_len']
    _, _, cut = encoder.tokenize(list(prompts), max_len=length)
    text, mask = encoder.encode(list(prompts), max_len=length)
    return Embedding(
      prompts=tuple(prompts),
      text=np.asarray(text, np.float32),
      mask=np.asarray(mask),
      cut=tuple(int(n) for n in cut),
    )

  def settings(self, **choices):
    """`Sampling` of every stage: its own defaults, changed by `choices`.

    Each choice is one value for all stages or a list with one per stage; None
    keeps the stage's default. `threshold='none'` is no thresholding.

    Raises:
      UsageError: a list's length is not the number of stages, or a value
        cannot work.
    """
    result = []
    for i, stage in enumerate(self.stages):
      changes = {}
      for name, value in choices.items():
        if value is None:
          continue
        if isinstance(value, list | tuple) and name != 'guidance_interval':
          if len(value) != len(self.stages):
            names = ', '.join(s.name for s in self.stages)
            raise UsageError(
              f'{name} has {len(value)} values for {len(self.stages)} '
              f'stages ({names}); give one, or one for each.'
            )
          value = value[i]
        changes[name] = None if value == 'none' else value
      setting = dataclasses.replace(stage.sampling, **changes)
      sampling.check_sampling(stage, setting)
      result.append(setting)
    return result

  def sample(
    self,
    prompts,
    *,
    seed=0,
    num_images=1,
    indices=None,
    low_res=None,
    image=None,
    mask=None,
    batch_size=None,
    callback=None,
    **choices,
  ):
    """Generates images of prompts.

    Image i of a prompt depends on (seed, prompt, i) and the settings, not on
    what else is generated: the compiled batch has a fixed size and the last one
    is padded.

    Args:
      prompts: a list of strings, or an `Embedding`. An empty string is
        unconditional: guidance does nothing there.
      seed: an int.
      num_images: images of each prompt.
      indices: their numbers, instead of 0 … num_images − 1.
      low_res: uint8 [N, h, w, 3], the images that the first selected stage
        upsamples, when that is not the base; one per image generated.
      image: a PIL image of any shape to start from, see `Sampling.strength`,
        or to repaint.
      mask: a PIL image of the same shape, white where to inpaint; elsewhere
        every stage keeps `image`, resized, to the bit.
      batch_size: images generated at a time, all of them up to 4 by default.
      callback: called as callback(stage_name, done, total) as images come.
      **choices: fields of `Sampling` (sampler, steps, guidance, aug_level, …),
        one value or one per stage.

    Returns:
      {stage name: uint8 [N, H, W, 3]}, in the order of the stages; images of
      one prompt stand together.

    Raises:
      UsageError, ModelError: as `settings`, `embed` and `load`.
    """
    settings = self.settings(**choices)
    embedding = prompts if isinstance(prompts, Embedding) else None
    if embedding is None:
      prompts = [prompts] if isinstance(prompts, str) else list(prompts)
      embedding = self.embed(prompts)
    if not 0 <= seed < 2**32:
      raise UsageError(f'seed is {seed}; it lies in 0 … 2³² − 1.')
    indices = list(range(num_images)) if indices is None else list(indices)
    rows = [(p, i) for p in range(len(embedding.prompts)) for i in indices]
    if not rows:
      raise UsageError(
        'there is nothing to generate: give a prompt, and num_images ≥ 1.'
      )
    image_io.check_pair(image, mask)
    low = self._first_input(low_res, len(rows))
    results = {}
    for stage, record, setting in zip(self.stages, self._records, settings):
      low = self._run_stage(
        stage,
        record,
        setting,
        embedding,
        rows,
        low,
        _start(stage, low, image, mask),
        seed,
        batch_size or min(4, len(rows)),
        callback,
      )
      results[stage.name] = conditioning.to_uint8(low)
    return results

  def _first_input(self, low_res, count):
    first = self.stages[0]
    if first.low_resolution is None:
      if low_res is not None:
        raise UsageError(
          f'stage {first.name} generates from text alone and takes no '
          'low-resolution image; choose a later stage with --stages.'
        )
      return None
    if low_res is None:
      raise UsageError(
        f'stage {first.name} upsamples images: give it one with --low_res, '
        'or start with the base stage.'
      )
    low = np.asarray(low_res, np.float32) / 127.5 - 1
    if low.shape[0] != count:
      low = np.broadcast_to(low, (count, *low.shape[1:]))
    return low

  def _run_stage(
    self,
    stage,
    record,
    setting,
    embedding,
    rows,
    low,
    start_from,
    seed,
    batch,
    callback,
  ):
    """One stage for every row, `batch` rows at a time, the last one padded."""
    mesh = self._mesh(model_folder.float32_bytes(record))
    batch = -(-batch // mesh.size) * mesh.size
    params = model_folder.load_params(
      record,
      put=lambda x: jax.device_put(x, sharding.leaf_sharding(x, mesh)),
    )
    shardings = sharding.batch_sharding(mesh)
    generate = compiled(stage, _static(setting), shardings)
    generated = []
    for start in range(0, len(rows), batch):
      chosen = rows[start : start + batch]
      padded = chosen + [chosen[-1]] * (batch - len(chosen))
      prompts = np.array([p for p, _ in padded])
      text, mask = embedding.text[prompts], embedding.mask[prompts]
      # An empty prompt is the null condition: both branches are then equal.
      empty = np.array([not embedding.prompts[p].strip() for p in prompts])
      text = np.where(empty[:, None, None], 0, text)
      mask = mask & ~empty[:, None]
      arrays = {
        'keys': _stack_keys(
          stage, seed, [(embedding.prompts[p], i) for p, i in padded]
        ),
        'text': text,
        'mask': mask,
      }
      if low is not None:
        lows = low[start : start + batch]
        fill = np.repeat(lows[-1:], batch - len(lows), axis=0)
        arrays['low'] = np.concatenate([lows, fill])
      for name, array in start_from.items():
        arrays[name] = np.broadcast_to(array, (batch, *array.shape))
      arrays = sharding.put_whole_batch(arrays, mesh)
      with jax.set_mesh(mesh):
        out = generate(
          params,
          arrays['keys'],
          arrays['text'],
          arrays['mask'],
          arrays.get('low'),
          jnp.float32(setting.guidance),
          jnp.float32(setting.aug_level),
          arrays.get('image'),
          arrays.get('inpaint_mask'),
        )
      generated.append(sharding.fetch(out)[: len(chosen)])
      if callback is not None:
        callback(stage.name, start + len(chosen), len(rows))
    jax.tree.map(lambda leaf: leaf.delete(), params)
    return np.concatenate(generated)


def _start(stage, low, image, mask):
  """{'image', 'inpaint_mask'} of a stage: the user's image and mask, resized.

  Raises:
    UsageError: the network cannot generate that shape.
  """
  if image is None:
    return {}
  if low is None:
    width, height = image_io.shaped(*image.size, stage.resolution)
  else:
    factor = stage.resolution // stage.low_resolution
    height, width = (side * factor for side in low.shape[1:3])
  multiple = stages.multiple(stage)
  if height % multiple or width % multiple:
    raise UsageError(
      f'stage {stage.name} cannot generate {width}×{height} pixels: it takes '
      f'multiples of {multiple}; crop the image.'
    )
  start = {'image': image_io.to_float(image, width, height)}
  if mask is not None:
    start['inpaint_mask'] = image_io.to_mask(mask, width, height)
  return start


def _static(setting):
  """What of the settings is compiled in: not the weight, only whether any."""
  guided = 1.0 if setting.guidance == 1 else 2.0
  return dataclasses.replace(setting, guidance=guided, aug_level=0.0)


@functools.lru_cache(maxsize=32)
def compiled(stage, settings, shardings=None):
  """The jitted call that generates one batch of images with a stage."""

  def generate(params, keys, *given):
    keys = jax.random.wrap_key_data(keys, impl='threefry2x32')
    return sampling.sample(stage, params, keys, *given, settings=settings)

  return jax.jit(generate, out_shardings=shardings)


def _stack_keys(stage, seed, images):
  """uint32 [B, 2]: key data of (seed, prompt, i), another for each stage."""
  return np.stack(
    [
      np.asarray(
        jax.random.key_data(
          jax.random.fold_in(image_key(seed, prompt, i), stage.resolution)
        )
      )
      for prompt, i in images
    ]
  )
