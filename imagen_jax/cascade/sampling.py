"""Sampling from a stage."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from imagen_jax.cascade import stage as stages
from imagen_jax.cascade.autoguidance import Weak
from imagen_jax.cascade.conditioning import low_res_input, null_where
from imagen_jax.cascade.programs import Program
from imagen_jax.cascade.stage import Stage
from imagen_jax.diffusion import guidance, process, reverse
from imagen_jax.diffusion.reverse import Inpaint, Reverse, State, Trajectory
from imagen_jax.diffusion.samplers import SamplerSpec
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
    keys: [B] keys, one per image; `program` takes their data, uint32 [B, 2].
    text: [B, L, D] embeddings.
    mask: [B, L] bool, True at real tokens.
    low_res: [B, h, w, 3] in [−1, 1], for a super-resolution stage.
    guidance: w, a scalar; None does not evaluate the unconditional branch.
    aug_level: noise on `low_res`, a scalar in [0, 1].
    image: [B, H, W, 3] in [−1, 1], an image to start from, see
      `SamplerSpec.strength`, or to inpaint; the result has its shape.
    inpaint_mask: [B, H, W, 1], with `image`: 1 where to inpaint, 0 where to
      keep it.
    negative: [B, L, D] embeddings that replace the null condition of the
      unconditional branch.
    negative_mask: [B, L] bool, with `negative`.
    autoguidance: w of the weaker model, a scalar; None does not evaluate it.
    weak: the weaker model, with `autoguidance`.
  """

  keys: Keys | KeyData
  text: TextEmb
  mask: TextMask
  low_res: LowRes | None = None
  guidance: Scalars | None = None
  aug_level: Scalars | None = None
  image: Image | None = None
  inpaint_mask: PixelMask | None = None
  negative: TextEmb | None = None
  negative_mask: TextMask | None = None
  autoguidance: Scalars | None = None
  weak: Weak | None = None

  @property
  def weights(self) -> tuple[Scalars, ...]:
    """The weights of the branches besides the conditional one."""
    given = self.guidance, self.autoguidance
    return tuple(w for w in given if w is not None)


def network(
  stage: Stage,
  params: dict,
  inputs: SampleInputs,
  low_res: tuple[Image, AugLevel] | tuple[()] = (),
) -> Callable:
  """The network as f(z, logsnr, branch), for `diffusion.guidance.guided`.

  `branch` is 'cond', or 'all' for a tuple: the conditional output, with
  `inputs.guidance` the unconditional one, both evaluated as one batch of 2B
  rows, and with `inputs.autoguidance` that of the weaker model.

  Args:
    stage: the stage.
    params: its parameters.
    inputs: with the texts, their masks and the weaker model.
    low_res: for a super-resolution stage, the upsampled low-resolution images
      [B, H, W, 3] and their augmentation levels [B].
  """
  net = functools.partial(stages.apply, stage.net, params)
  weak = inputs.weak
  given = inputs.text, inputs.mask
  null: Any = null_where(jnp.ones(len(inputs.text), bool), *given)
  if inputs.negative is not None:
    null = inputs.negative, inputs.negative_mask
  text, mask = (jnp.concatenate(pair) for pair in zip(given, null))

  def apply(z: Array, logsnr: Array, branch: str) -> Any:
    arrays = z, logsnr, *given, *low_res
    if branch == 'cond':
      return net(*arrays)
    if inputs.guidance is None:
      outputs: list[Any] = [net(*arrays)]
    else:
      z, logsnr, *low = (jnp.concatenate([a, a]) for a in (z, logsnr, *low_res))
      outputs = jnp.split(net(z, logsnr, text, mask, *low), 2)
    if weak is not None and inputs.autoguidance is not None:
      outputs.append(stages.apply(weak.net, weak.params, *arrays))
    return outputs

  return apply


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
  images = reverse.sample(_reverse(stage, params, spec, inputs))
  return jnp.clip(images, -1, 1)


def trajectory(
  stage: Stage, params: dict, spec: SamplerSpec, inputs: SampleInputs
) -> Trajectory:
  """The noisy images and the predictions of all steps of `sample`."""
  return reverse.trajectory(_reverse(stage, params, spec, inputs))


@functools.partial(jax.jit, static_argnames=('stage', 'spec'))
def finite(
  stage: Stage, params: dict, spec: SamplerSpec, inputs: SampleInputs
) -> Bool[Array, ' n']:
  """Whether the predictions of each step of `program` are finite."""
  inputs = inputs._replace(keys=_wrapped(inputs.keys))
  return reverse.finite(_reverse(stage, params, spec, inputs))


def _wrapped(key_data: KeyData) -> Keys:
  return jax.random.wrap_key_data(jnp.asarray(key_data), impl='threefry2x32')


def _reverse(
  stage: Stage, params: dict, spec: SamplerSpec, inputs: SampleInputs
) -> Reverse:
  """The reverse process of a stage."""
  image, inpaint = inputs.image, None
  if inputs.inpaint_mask is not None:
    if image is None:
      raise ValueError('inpaint_mask needs its image')
    inpaint = Inpaint(image, inputs.inpaint_mask)
  if (inputs.autoguidance is None) != (inputs.weak is None):
    raise ValueError('autoguidance needs a weaker model, and that its weight')
  denoise = guidance.guided(
    network(stage, params, inputs, _low_res(stage, inputs)),
    weights=inputs.weights,
    prediction=stage.prediction,
    spec=spec,
  )
  keys, start = _fold(inputs.keys, 0), 1.0
  if image is not None and spec.strength < 1:
    start = spec.strength
    eps = _normal(inputs.keys, 2, image.shape[1:])
    z = process.diffuse(image, eps, stage.logsnr_fn(jnp.float32(start)))
  else:
    height = width = stage.resolution
    if inputs.low_res is not None:
      height, width = (n * stage.factor for n in inputs.low_res.shape[1:3])
    elif image is not None:
      height, width = image.shape[1:3]
    z = reverse.initial_noise(keys, (height, width, 3))
  logsnr = reverse.logsnr_grid(stage.logsnr_fn, spec, start=start)
  memory = spec.memory(z, len(inputs.weights))
  return Reverse(keys, z, logsnr, denoise, spec, inpaint, memory)


def _low_res(
  stage: Stage, inputs: SampleInputs
) -> tuple[Image, AugLevel] | tuple[()]:
  """The upsampled low-resolution images and their levels, if there are any.

  They are noised once, before the loop: every step sees the same images.
  """
  if inputs.low_res is None:
    return ()
  if inputs.aug_level is None:
    raise ValueError('low_res needs its aug_level')
  level = jnp.full(inputs.keys.shape[:1], inputs.aug_level, jnp.float32)
  eps = _normal(inputs.keys, 1, inputs.low_res.shape[1:])
  return low_res_input(stage, eps, inputs.low_res, level), level


def _fold(keys: Keys | KeyData, number: int) -> Keys:
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _normal(keys: Keys | KeyData, number: int, shape: tuple[int, ...]) -> Image:
  row = lambda key: jax.random.normal(key, shape, jnp.float32)
  return jax.vmap(row)(_fold(keys, number))


def sampler(
  stage: Stage, spec: SamplerSpec
) -> Callable[[dict, SampleInputs], Image]:
  """`sample` of a stage, to compile.

  Args:
    stage: the stage.
    spec: the sampler's settings.

  Returns:
    (params, inputs with key data for keys) -> images.
  """

  def run(params: dict, inputs: SampleInputs) -> Image:
    inputs = inputs._replace(keys=_wrapped(inputs.keys))
    return sample(stage, params, spec, inputs)

  return run


def no_state(stage: Stage, spec: SamplerSpec, inputs: SampleInputs) -> State:
  """Zeros [B, ...] for `program` to start from, for inputs with key data."""

  def first(inputs: SampleInputs) -> State:
    inputs = inputs._replace(keys=_wrapped(inputs.keys))
    return reverse.first_state(_reverse(stage, {}, spec, inputs))

  zeros = lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape)
  return jax.tree.map(zeros, jax.eval_shape(first, inputs))


@functools.lru_cache(maxsize=32)
def program(
  stage: Stage,
  spec: SamplerSpec,
  shardings: jax.sharding.Sharding,
  identity: str | None,
) -> Program:
  """Steps of `sample`, compiled, and kept in memory and on disk.

  As a function of (params, inputs with key data for keys, first, stop, state)
  it takes the steps `first` … `stop` − 1. The images are the last state's x,
  clipped; a state before step 0 has no effect.

  Args:
    stage: the stage.
    spec: the sampler's settings.
    shardings: of the state.
    identity: of the stage; None keeps the program in memory only.
  """

  def run(
    params: dict, inputs: SampleInputs, first: Array, stop: Array, state: State
  ) -> State:
    inputs = inputs._replace(keys=_wrapped(inputs.keys))
    made = _reverse(stage, params, spec, inputs)
    start = reverse.first_state(made)
    given = jax.tree.map(lambda a, b: jnp.where(first > 0, a, b), state, start)
    return reverse.advance(made, given, first, stop)

  if identity is not None:
    identity = f'{identity} {spec} {shardings}'
  return Program(run, identity, out_shardings=shardings)
