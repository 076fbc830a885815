"""One IF stage: a folder with a U-Net and its schedules; how it is sampled."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from imagen_jax.deepfloyd import config as configs
from imagen_jax.deepfloyd import sampling, schedule, weights
from imagen_jax.deepfloyd.images import upsample


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage's folder says, without its weights.

  Attributes:
    folder: with `unet/`, `scheduler/` and, of a super-resolution stage,
      `image_noising_scheduler/` in it.
    config: the U-Net's.
    schedule: of the diffusion.
    noising: of the noise on the low-resolution image, or None.
  """

  folder: pathlib.Path
  config: configs.UNetConfig
  schedule: schedule.Schedule
  noising: schedule.Schedule | None

  @property
  def name(self):
    return self.folder.name

  @property
  def upsamples(self):
    return self.config.in_channels == 6

  @property
  def resolution(self):
    """Side of its square images."""
    return self.config.sample_size or (256 if self.upsamples else 64)

  def load(self, *, dtype, weights_dtype=None, place=None):
    """(module, params); see `weights.load`."""
    return weights.load(
      self.folder / 'unet',
      dtype=dtype,
      weights_dtype=weights_dtype,
      place=place,
    )


def read(folder):
  """The `Stage` in a folder.

  Raises:
    ModelError: a part is missing, or of another model.
  """
  folder = pathlib.Path(folder)
  config = configs.read(folder / 'unet')
  noising = None
  if config.in_channels == 6:
    name = 'image_noising_scheduler'
    noising = schedule.read(folder, name)
  return Stage(folder, config, schedule.read(folder), noising)


class Given(NamedTuple):
  """What an image is generated from; B images, None for what plays no part.

  Attributes:
    text: [B, L, D] embeddings of the prompts.
    uncond: [B, L, D], of the empty or negative prompt; None: no guidance.
    weight: of the guidance.
    low: [B, h, w, 3] in [−1, 1], to be upsampled.
    low_alpha, low_sigma: signal and noise in it.
    noise_level: the step number that says the same.
    image: [B, H, W, 3] in [−1, 1] to start from.
    mask: [B, H, W, 1], 1 where to inpaint, with `image`.
    pooled: [B, L, D], a style for the pooled text.
    mixed: [B, L, D], a second prompt.
    mixer: its fraction.
  """

  text: jax.Array
  uncond: jax.Array | None = None
  weight: float = 1.0
  low: jax.Array | None = None
  low_alpha: float = 1.0
  low_sigma: float = 0.0
  noise_level: float = 0.0
  image: jax.Array | None = None
  mask: jax.Array | None = None
  pooled: jax.Array | None = None
  mixed: jax.Array | None = None
  mixer: float = 0.0


class Noise(NamedTuple):
  """Every random number of a run: [B, H, W, 3] each, standard normal.

  Attributes:
    start: of the first step's image.
    low: on the upsampled low-resolution image.
    step: function of a step's (traced) index.
  """

  start: jax.Array
  low: jax.Array
  step: Callable


def noise_from_keys(keys, shape):
  """The `Noise` of images [H, W, 3], one key each, whatever the batch."""

  def generate(use, index=None):
    def one(key):
      key = jax.random.fold_in(key, use)
      if index is not None:
        key = jax.random.fold_in(key, index)
      return jax.random.normal(key, shape)

    return jax.vmap(one)(keys)

  return Noise(generate(0), generate(1), functools.partial(generate, 2))


def run(module, params, plan, given, noise, made):
  """Generates B images with one network; one scan over the steps.

  Args:
    module: `IFUNet`.
    params: its parameters.
    plan: `schedule.Plan`.
    given: `Given`.
    noise: `Noise`.
    made: the stage's `Schedule`.

  Returns:
    [B, H, W, 3] float32 in [−1, 1], as the last step left it.
  """
  low = level = None
  if given.low is not None:
    low = upsample(given.low, *noise.start.shape[1:3])
    low = given.low_alpha * low + given.low_sigma * noise.low
    level = given.noise_level
  predict = sampling.predictor(
    module,
    params,
    given.text,
    uncond=given.uncond,
    weight=given.weight,
    low_res=low,
    noise_level=level,
    pooled_text=given.pooled,
    mixed_text=given.mixed,
    mixer=given.mixer,
  )
  z = noise.start
  if given.image is not None:
    z = sampling.add_noise(given.image, noise.start, plan, given.mask)
  return sampling.sample(predict, plan, z, noise.step, made, mask=given.mask)


@functools.partial(jax.jit, static_argnames=('module', 'made', 'shape'))
def generate(params, plan, given, keys, *, module, made, shape):
  """`run` with noise from keys, compiled once per shape and number of steps.

  Args:
    params: the network's.
    plan: `schedule.Plan`; the sampler is in its numbers.
    given: `Given`.
    keys: uint32 [B, 2], key data.
    module: `IFUNet`.
    made: `Schedule`.
    shape: (H, W, 3).
  """
  keys = jax.random.wrap_key_data(keys, impl='threefry2x32')
  noise = noise_from_keys(keys, shape)
  out = run(module, params, plan, given, noise, made)
  if jax.sharding.get_abstract_mesh().empty:
    return out
  # Every process holds every image.
  return jax.lax.with_sharding_constraint(out, jax.sharding.PartitionSpec())


def noise_terms(noising, level):
  """`Given`'s fields for noise on the upsampled image.

  Args:
    noising: `Schedule` of that noise.
    level: a step number of it.
  """
  abar = schedule.alphas_cumprod(noising)[level]
  return {
    'low_alpha': np.float32(np.sqrt(abar)),
    'low_sigma': np.float32(np.sqrt(1 - abar)),
    'noise_level': np.float32(level),
  }
