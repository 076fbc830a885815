"""One IF stage: its folder with a U-Net and schedules, and its sampling."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from imagen_jax import compiler
from imagen_jax.deepfloyd import config as configs
from imagen_jax.deepfloyd import sampling
from imagen_jax.deepfloyd import schedule as schedules
from imagen_jax.deepfloyd.images import upsample
from imagen_jax.deepfloyd.unet import IFUNet
from imagen_jax.typing import (
  Array,
  Image,
  KeyData,
  Keys,
  LowRes,
  PixelMask,
  Scalars,
  TextEmb,
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """The contents of a stage's folder, without the weights.

  Attributes:
    folder: with `unet/`, `scheduler/` and, for a super-resolution stage,
      `image_noising_scheduler/` in it.
    config: of the U-Net.
    schedule: of the diffusion.
    noising: schedule of the noise on the low-resolution image, or None.
  """

  folder: pathlib.Path
  config: configs.UNetConfig
  schedule: schedules.Schedule
  noising: schedules.Schedule | None

  @property
  def name(self) -> str:
    return self.folder.name

  @property
  def upsamples(self) -> bool:
    return self.config.in_channels == 6

  @property
  def resolution(self) -> int:
    """Side of its square images."""
    return self.config.sample_size or (256 if self.upsamples else 64)


def read(folder: str | pathlib.Path) -> Stage:
  """The `Stage` in a folder.

  Raises:
    ModelError: a part is missing, or is another model's.
  """
  folder = pathlib.Path(folder)
  config = configs.read(folder / 'unet')
  noising = None
  if config.in_channels == 6:
    noising = schedules.read(folder, 'image_noising_scheduler')
  return Stage(folder, config, schedules.read(folder), noising)


class SampleInputs(NamedTuple):
  """The traced inputs of sampling; None: not used.

  Attributes:
    text: [B, L, D] embeddings of the prompts.
    keys: uint32 [B, 2], key data, one key per image.
    uncond: [B, L, D], of the empty or negative prompt; None: no guidance.
    guidance: w, a scalar.
    low_res: [B, h, w, 3] in [−1, 1], to be upsampled.
    low_alpha, low_sigma: signal and noise scale of its augmentation, scalars.
    noise_level: the step number of the same noise.
    image: [B, H, W, 3] in [−1, 1] to start from.
    inpaint_mask: [B, H, W, 1], 1 where to inpaint, with `image`.
    pooled: [B, L, D], the style prompt, for the pooled text vector.
    mixed: [B, L, D], the second prompt.
    mixer: weight of its prediction, a scalar.
  """

  text: TextEmb
  keys: KeyData | None = None
  uncond: TextEmb | None = None
  guidance: Scalars | None = None
  low_res: LowRes | None = None
  low_alpha: Scalars | None = None
  low_sigma: Scalars | None = None
  noise_level: Scalars | None = None
  image: Image | None = None
  inpaint_mask: PixelMask | None = None
  pooled: TextEmb | None = None
  mixed: TextEmb | None = None
  mixer: Scalars | None = None


class Noise(NamedTuple):
  """All noise of a sampling run: [B, H, W, 3] each, standard normal.

  Attributes:
    start: of the initial image.
    low: on the upsampled low-resolution image.
    step: function of a step's (traced) index.
  """

  start: Image
  low: Image
  step: Callable[[jax.Array], Image]


def noise_from_keys(keys: Keys, shape: tuple[int, int, int]) -> Noise:
  """The `Noise` of images [H, W, 3], one key each, independent of the batch."""

  def noise(use: int, index: jax.Array | None = None) -> Image:
    def one(key: jax.Array) -> jax.Array:
      key = jax.random.fold_in(key, use)
      if index is not None:
        key = jax.random.fold_in(key, index)
      return jax.random.normal(key, shape)

    return jax.vmap(one)(keys)

  return Noise(noise(0), noise(1), functools.partial(noise, 2))


def run(
  module: IFUNet,
  params: dict,
  plan: schedules.Plan,
  inputs: SampleInputs,
  noise: Noise,
  made: schedules.Schedule,
  *,
  finite: bool = False,
) -> Image | Bool[Array, ' n']:
  """Samples B images with one network; one scan over the steps.

  Args:
    module: the network.
    params: its parameters.
    plan: the steps.
    inputs: `SampleInputs`; their keys are not used.
    noise: of the whole run.
    made: the stage's schedule.
    finite: return whether each step's images are finite instead.

  Returns:
    [B, H, W, 3] float32 in [−1, 1], the last step's result.
  """
  low = level = None
  if inputs.low_res is not None:
    low = upsample(inputs.low_res, *noise.start.shape[1:3])
    if inputs.low_alpha is None or inputs.low_sigma is None:
      raise ValueError('low_res needs its noise_terms')
    low = inputs.low_alpha * low + inputs.low_sigma * noise.low
    level = inputs.noise_level
  fields = sampling.Texts._fields
  texts = sampling.Texts(*(getattr(inputs, field) for field in fields))
  predict = sampling.predictor(
    module, params, texts, low_res=low, noise_level=level
  )
  z, mask = noise.start, inputs.inpaint_mask
  if inputs.image is not None:
    z = sampling.add_noise(inputs.image, noise.start, plan, mask)
  return sampling.sample(
    predict, plan, z, noise.step, made, mask=mask, finite=finite
  )


def generate(
  params: dict,
  inputs: SampleInputs,
  plan: schedules.Plan,
  *,
  module: IFUNet,
  made: schedules.Schedule,
  shape: tuple[int, int, int],
  finite: bool = False,
) -> Image | Bool[Array, ' n']:
  """`run` with noise from keys.

  Args:
    params: of the network.
    inputs: `SampleInputs`.
    plan: the steps; its coefficients determine the sampler.
    module: the network.
    made: the stage's schedule.
    shape: (H, W, 3).
    finite: return whether each step's images are finite instead.
  """
  keys = jax.random.wrap_key_data(jnp.asarray(inputs.keys), impl='threefry2x32')
  noise = noise_from_keys(keys, shape)
  out = run(module, params, plan, inputs, noise, made, finite=finite)
  if jax.sharding.get_abstract_mesh().empty:
    return out
  # Every process holds every image.
  return jax.lax.with_sharding_constraint(out, jax.sharding.PartitionSpec())


@functools.cache
def jitted() -> jax.stages.Wrapped:
  """`generate`, compiled once per network, shape and number of steps."""
  return jax.jit(
    generate,
    static_argnames=('module', 'made', 'shape', 'finite'),
    compiler_options=compiler.sampling_options(),
  )


def noise_terms(
  noising: schedules.Schedule, level: int
) -> dict[str, np.float32]:
  """The fields of `SampleInputs` for noise on the upsampled image.

  Args:
    noising: `Schedule` of that noise.
    level: its step number.
  """
  abar = schedules.alphas_cumprod(noising)[level]
  return {
    'low_alpha': np.float32(np.sqrt(abar)),
    'low_sigma': np.float32(np.sqrt(1 - abar)),
    'noise_level': np.float32(level),
  }
