"""Sampling from a stage."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from imagen_jax.cascade.conditioning import low_res_input, null_where
from imagen_jax.cascade.stage import SamplingConfig, Stage
from imagen_jax.diffusion import guidance, process, samplers
from imagen_jax.diffusion.samplers import Inpaint, SamplerSpec, Trajectory
from imagen_jax.errors import UsageError
from imagen_jax.typing import (
  Array,
  AugLevel,
  Image,
  KeyData,
  Keys,
  LowRes,
  PixelMask,
  Scalars,
  TextEmb,
  TextMask,
)


class SampleInputs(NamedTuple):
  """The arrays that images are sampled from; None where there are none.

  Attributes:
    keys: [B] keys, one per image; `compiled` takes their data, uint32 [B, 2].
    text: [B, L, D] embeddings.
    mask: [B, L] bool, True at real tokens.
    low_res: [B, h, w, 3] in [−1, 1], for a super-resolution stage.
    guidance: w, a scalar; None evaluates the conditional branch only.
    aug_level: noise on `low_res`, a scalar in [0, 1].
    image: [B, H, W, 3] in [−1, 1], an image to start from, see
      `SamplerSpec.strength`, or to inpaint; the result has its shape.
    inpaint_mask: [B, H, W, 1], with `image`: 1 where to inpaint, 0 where to
      keep it.
  """

  keys: Keys | KeyData
  text: TextEmb
  mask: TextMask
  low_res: LowRes | None = None
  guidance: Scalars | None = None
  aug_level: Scalars | None = None
  image: Image | None = None
  inpaint_mask: PixelMask | None = None


def network(
  stage: Stage,
  params: dict,
  text: TextEmb,
  mask: TextMask,
  low_res: tuple[Image, AugLevel] | tuple[()] = (),
) -> Callable:
  """The network as f(z, logsnr, branch), for `diffusion.guidance.guided`.

  `branch` is 'cond', or 'both', which evaluates the text and the null
  condition as one batch of 2B rows and returns the pair.

  Args:
    stage: the stage.
    params: its parameters.
    text: [B, L, D] embeddings.
    mask: [B, L] bool.
    low_res: for a super-resolution stage, the upsampled low-resolution images
      [B, H, W, 3] and their augmentation levels [B].
  """

  def apply(z: Array, logsnr: Array, branch: str) -> Any:
    if branch == 'both':
      both = _twice((z, logsnr, text, mask, *low_res))
      dropped = jnp.arange(2 * z.shape[0]) >= z.shape[0]
      hidden = null_where(dropped, both[2], both[3])
      out = stage.net.apply({'params': params}, *both[:2], *hidden, *both[4:])
      return out[: z.shape[0]], out[z.shape[0] :]
    return stage.net.apply({'params': params}, z, logsnr, text, mask, *low_res)

  return apply


def _twice(arrays: Sequence[Array]) -> list[Array]:
  return [jnp.concatenate([a, a], axis=0) for a in arrays]


def sample(
  stage: Stage, params: dict, spec: SamplerSpec, inputs: SampleInputs
) -> Image:
  """Samples images from a stage; one compiled loop over the steps.

  Args:
    stage: the stage.
    params: its parameters.
    spec: the sampler's settings.
    inputs: keys, conditioning and images to start from.

  Returns:
    [B, H, W, 3] float32 in [−1, 1], of the shape of `inputs.low_res`
    upsampled, else of `inputs.image`, else square.
  """
  arguments = _arguments(stage, params, spec, inputs)
  return jnp.clip(samplers.sample(**arguments), -1, 1)


def trajectory(
  stage: Stage, params: dict, spec: SamplerSpec, inputs: SampleInputs
) -> Trajectory:
  """The noisy images and the predictions of all steps of `sample`."""
  return samplers.trajectory(**_arguments(stage, params, spec, inputs))


def _arguments(
  stage: Stage, params: dict, spec: SamplerSpec, inputs: SampleInputs
) -> dict[str, Any]:
  """The arguments of `samplers.sample`."""
  keys, image = inputs.keys, inputs.image
  height = width = stage.resolution
  if image is not None:
    height, width = image.shape[1:3]
  low_res: tuple[Image, AugLevel] | tuple[()] = ()
  if inputs.low_res is not None:
    height, width = (side * stage.factor for side in inputs.low_res.shape[1:3])
    if inputs.aug_level is None:
      raise ValueError('low_res needs its aug_level')
    level = jnp.full(keys.shape[:1], inputs.aug_level, jnp.float32)
    eps = _normal(keys, 1, inputs.low_res.shape[1:])
    # Noised once, before the loop: every step sees the same low-res image.
    low_res = low_res_input(stage, eps, inputs.low_res, level), level
  denoise = guidance.guided(
    network(stage, params, inputs.text, inputs.mask, low_res),
    weight=inputs.guidance,
    prediction=stage.prediction,
    threshold=spec.threshold,
    percentile=spec.percentile,
    interval=spec.guidance_interval,
  )
  step_keys, start = _fold(keys, 0), 1.0
  if image is not None and spec.strength < 1:
    start = spec.strength
    eps = _normal(keys, 2, image.shape[1:])
    z = process.diffuse(image, eps, stage.logsnr_fn(jnp.float32(start)))
  else:
    z = samplers.initial_noise(step_keys, (height, width, 3))
  inpaint = None
  if inputs.inpaint_mask is not None:
    if image is None:
      raise ValueError('inpaint_mask needs its image')
    inpaint = Inpaint(image, inputs.inpaint_mask)
  return {
    'keys': step_keys,
    'z': z,
    'logsnr': samplers.logsnr_grid(stage.logsnr_fn, spec, start=start),
    'denoise': denoise,
    'spec': spec,
    'inpaint': inpaint,
  }


def _fold(keys: Keys | KeyData, number: int) -> Keys:
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _normal(keys: Keys | KeyData, number: int, shape: tuple[int, ...]) -> Image:
  row = lambda key: jax.random.normal(key, shape, jnp.float32)
  return jax.vmap(row)(_fold(keys, number))


@functools.lru_cache(maxsize=32)
def compiled(
  stage: Stage,
  spec: SamplerSpec,
  shardings: jax.sharding.Sharding | None = None,
) -> Callable[[dict, SampleInputs], jax.Array]:
  """The jitted `sample` of a stage, cached.

  Args:
    stage: the stage.
    spec: the sampler's settings.
    shardings: of the images.

  Returns:
    (params, inputs with key data for keys) -> images.
  """

  def run(params: dict, inputs: SampleInputs) -> Image:
    keys = jax.random.wrap_key_data(
      jnp.asarray(inputs.keys), impl='threefry2x32'
    )
    return sample(stage, params, spec, inputs._replace(keys=keys))

  return jax.jit(run, out_shardings=shardings)


def check_sampling(stage: Stage, config: SamplingConfig) -> None:
  """Rejects settings that this stage was not trained for.

  Raises:
    UsageError: guidance without caption dropout, or an augmentation level
      outside [0, max_level].
  """
  if config.guidance != 1 and stage.cond_drop == 0:
    raise UsageError(
      f'stage {stage.name}: guidance {config.guidance:g} needs a model trained '
      'with caption dropout, and this one had stage.cond_drop = 0; use 1.',
      key='guidance',
    )
  if not 0 <= config.aug_level <= stage.max_level:
    raise UsageError(
      f'stage {stage.name}: aug_level is {config.aug_level:g}; it lies in '
      f'[0, {stage.max_level:g}], and 0.1 to 0.3 give the best-looking '
      'images.',
      key='aug_level',
    )
