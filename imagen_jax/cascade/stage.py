"""A stage of the cascade: network, schedule, settings and parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import dtypes
from imagen_jax.diffusion.loss import LossSpec
from imagen_jax.diffusion.samplers import SamplerSpec
from imagen_jax.errors import UsageError
from imagen_jax.nets.network import Network
from imagen_jax.typing import Array

# What values of other types raise where they are used.
WRONG = (
  ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip


def _part(cls: Any, whole: Any) -> Any:
  """A `cls` with the values that its fields have in `whole`."""
  return cls(**{name: getattr(whole, name) for name in field_names(cls)})


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SamplerSpec):
  """The sampling settings of a stage; each can be overridden per call.

  Attributes:
    guidance: w in w·cond + (1 − w)·uncond; 1 is no guidance.
    autoguidance: w in w·x + (1 − w)·x_weak, where x_weak is a weaker model's
      prediction; 1 is none.
    aug_level: noise added to the low-resolution image, in [0, 1] (2.4).
  """

  guidance: float = 1.0
  autoguidance: float = 1.0
  aug_level: float = 0.0

  @property
  def spec(self) -> SamplerSpec:
    """The settings that are compiled in."""
    return _part(SamplerSpec, self)

  @property
  def scalars(self) -> dict[str, np.float32 | None]:
    """The other settings, as fields of `sampling.SampleInputs`."""
    weight = lambda w: None if w == 1 else np.float32(w)
    return {
      'guidance': weight(self.guidance),
      'autoguidance': weight(self.autoguidance),
      'aug_level': np.float32(self.aug_level),
    }


@dataclasses.dataclass(frozen=True)
class Stage:
  """The hyper-parameters of one stage.

  Attributes:
    name: its directory's name, such as 'base' or 'sr1'.
    resolution: side of its images, in pixels.
    low_resolution: side of the images it upsamples; None for the base.
    net: the Linen module.
    logsnr_fn: t in [0, 1] -> log-SNR.
    text_dim: width of the text embeddings.
    text_len: number of text positions.
    prediction: 'eps' (the paper's), 'v' or 'x'.
    weighting: see `diffusion.loss`; None is the MSE of the prediction.
    stratified: spread the training times evenly over the batch.
    min_snr_gamma: γ of weighting 'min_snr'.
    sigmoid_bias: b of weighting 'sigmoid'.
    cond_drop: fraction of captions dropped in training (0.1 in the paper); 0
      rules out guidance.
    max_level: training samples augmentation levels from U(0, max_level); the
      paper's is 1 (2.4).
    contrast_floor: emphasise low-contrast edges in training, see
      `objective.contrast_weight`; None, as in the paper, weights all equally.
    crop: side of the training crops, None for whole images. The paper
      trains 256→1024 on 256-pixel crops.
    sampling: the default sampling settings.
  """

  name: str
  resolution: int
  low_resolution: int | None
  net: Network
  logsnr_fn: Callable[[Array], Array]
  text_dim: int
  text_len: int
  prediction: str = 'eps'
  weighting: str | None = None
  stratified: bool = False
  min_snr_gamma: float = LossSpec.min_snr_gamma
  sigmoid_bias: float = LossSpec.sigmoid_bias
  cond_drop: float = 0.1
  max_level: float = 1.0
  contrast_floor: float | None = None
  crop: int | None = None
  sampling: SamplingConfig = SamplingConfig()

  @property
  def factor(self) -> int:
    """The upsampling factor of a super-resolution stage."""
    if self.low_resolution is None:
      raise ValueError(f'stage {self.name} does not upsample')
    return self.resolution // self.low_resolution

  @property
  def loss_spec(self) -> LossSpec:
    """The fields of the loss."""
    return _part(LossSpec, self)


def field_names(cls: Any) -> list[str]:
  """The names of a dataclass's fields."""
  return [field.name for field in dataclasses.fields(cls)]


def init_params(stage: Stage, key: jax.Array) -> dict:
  """Initialises the float32 parameters of a stage.

  Raises:
    UsageError: the values of `stage.net` do not define a valid network.
  """
  side = stage.crop or stage.resolution
  z = jnp.zeros((1, side, side, 3))
  level = jnp.zeros((1,))
  text = jnp.zeros((1, stage.text_len, stage.text_dim))
  mask = jnp.ones((1, stage.text_len), bool)
  extra = () if stage.low_resolution is None else (z, level)
  try:
    return stage.net.init(key, z, level, text, mask, *extra)['params']
  except WRONG as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UsageError(
      f'stage.net of {stage.name} does not define a network ({reason[:200]}); '
      'give one value per level where there are several, and widths that '
      'head_dim and norm_groups divide.'
    ) from error


def apply(net: Any, params: dict, *arrays: Any, **options: Any) -> Any:
  """A `Network`'s output; float32 activations are multiplied in float32.

  A network without a `dtype` is taken to compute in float32.
  """
  dtype = getattr(net, 'dtype', jnp.float32)
  with dtypes.matmul_precision(dtype):
    return net.apply({'params': params}, *arrays, **options)


def param_shapes(stage: Stage) -> dict:
  """The shapes of `init_params`' result; raises as it does."""
  return jax.eval_shape(
    functools.partial(init_params, stage), jax.random.key(0)
  )


def num_params(params: Any) -> int:
  """The number of parameters in a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
