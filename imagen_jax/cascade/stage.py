"""What a stage is: its network, schedule and defaults, and its parameters."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.diffusion import schedule
from imagen_jax.errors import UsageError
from imagen_jax.nets.efficient_unet import EfficientUNet
from imagen_jax.nets.unet import UNet


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
    weighting: see `diffusion.loss.diffusion_loss`; None is the MSE of the
      prediction itself.
    min_snr_gamma, sigmoid_bias: of the weightings 'min_snr' and 'sigmoid'.
    stratified: spread the training times evenly over the batch.
    cond_drop: fraction of captions dropped in training (0.1); 0 forbids
      guidance.
    max_level: training samples augmentation levels from U(0, max_level); the
      paper's is 1 (2.4).
    contrast_floor: weigh faint edges up in training, see
      `objective.contrast_weight`; None, as in the paper, weighs all alike.
    crop: side of the training crops, None for whole images. The paper
      trains 256→1024 on 256-pixel crops.
    sampling: defaults of `sample` for this stage.
  """

  name: str
  resolution: int
  low_resolution: int | None
  net: nn.Module
  logsnr_fn: Callable
  text_dim: int
  text_len: int
  prediction: str = 'eps'
  weighting: str | None = None
  min_snr_gamma: float = 5.0
  sigmoid_bias: float = 0.0
  stratified: bool = False
  cond_drop: float = 0.1
  max_level: float = 1.0
  contrast_floor: float | None = None
  crop: int | None = None
  sampling: 'Sampling' = None


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one stage is sampled; every field can be chosen at call time.

  Attributes:
    sampler: 'ddpm', 'ddim' or 'dpmpp'.
    steps: network evaluations (each of two branches when guided).
    guidance: w in w·cond + (1 − w)·uncond; 1 is none.
    guidance_interval: (lowest, highest) log-SNR at which to guide, or None.
    threshold: 'dynamic', 'static' or None.
    percentile: of dynamic thresholding, on a 0–100 scale.
    aug_level: noise added to the low-resolution image, in [0, 1].
    gamma: of DDPM, between the two variances of eq. 6.
    eta: of DDIM, 0 is deterministic.
    strength: when starting from an image, how far back to noise, in (0, 1];
      the steps taken shrink with it.
    grid: steps evenly spaced in 'time' or in 'logsnr'.
  """

  sampler: str = 'dpmpp'
  steps: int = 32
  guidance: float = 1.0
  guidance_interval: tuple[float, float] | None = None
  threshold: str | None = 'dynamic'
  percentile: float = 99.5
  aug_level: float = 0.0
  gamma: float = 0.3
  eta: float = 0.0
  strength: float = 1.0
  grid: str = 'time'


NETS = {'unet': UNet, 'efficient_unet': EfficientUNet}


def from_config(config, *, text_dim, text_len, dtype=jnp.float32):
  """Builds a `Stage` from a config's `stage` section (a plain mapping).

  Args:
    config: name, resolution, low_resolution, net {kind, …}, schedule {kind,
      …}, and any other field of `Stage`; `sampling` holds `Sampling`'s.
    text_dim: width of the text encoder's embeddings.
    text_len: its number of positions.
    dtype: activations' type.

  Raises:
    UsageError: naming the key that is wrong.
  """
  config = {k: v for k, v in config.items()}
  net = dict(config.pop('net'))
  kind = net.pop('kind')
  if kind not in NETS:
    raise UsageError(
      f'stage.net.kind is {kind!r}; it can be {" or ".join(NETS)}.'
    )
  net = {k: _tuples(v) for k, v in net.items()}
  if kind == 'unet':
    net.setdefault('resolution', config['resolution'])
  sampling = {k: _tuples(v) for k, v in dict(config.pop('sampling')).items()}
  _known('stage.net', net, NETS[kind])
  _known('stage.sampling', sampling, Sampling)
  logsnr_fn = make_schedule(**dict(config.pop('schedule')))
  _known('stage', config, Stage)
  level = config.get('max_level', 1.0)
  if not 0 <= level <= 1:
    raise UsageError(f'stage.max_level is {level:g}; it lies in [0, 1].')
  floor = config.get('contrast_floor')
  if floor is not None and not floor > 0:
    raise UsageError(f'stage.contrast_floor is {floor:g}; it is positive.')
  if floor is not None and config.get('low_resolution') is None:
    raise UsageError(
      'stage.contrast_floor is for stages with a stage.low_resolution; '
      'set it to None.'
    )
  return Stage(
    net=NETS[kind](**net, dtype=dtype),
    logsnr_fn=logsnr_fn,
    sampling=Sampling(**sampling),
    text_dim=text_dim,
    text_len=text_len,
    **config,
  )


def _tuples(value):
  return tuple(value) if isinstance(value, list | tuple) else value


def _known(where, given, cls):
  fields = {field.name for field in dataclasses.fields(cls)}
  for key in given:
    if key not in fields:
      raise UsageError(
        f'{where} has no key {key!r}; it knows {", ".join(sorted(fields))}.'
      )


def make_schedule(kind, shift_from=None, resolution=None, **options):
  """A log-SNR function of t: kind 'cosine' or 'linear', optionally shifted.

  Args:
    kind: 'cosine' or 'linear'.
    shift_from: resolution at which the schedule holds unshifted; None: no
      shift. At `resolution` the log-SNR moves by 2·log(shift_from/resolution).
    resolution: the stage's, with `shift_from`.
    **options: of the schedule's function.
  """
  functions = {
    'cosine': schedule.cosine_logsnr,
    'linear': schedule.linear_logsnr,
  }
  if kind not in functions:
    raise UsageError(
      f"stage.schedule.kind is {kind!r}; it can be 'cosine' or 'linear'."
    )
  known = inspect.signature(functions[kind]).parameters
  for key in options:
    if key not in known:
      raise UsageError(
        f'stage.schedule has no key {key!r}; {kind!r} knows '
        f'{", ".join(name for name in known if name != "t")}.'
      )
  plain = functools.partial(functions[kind], **options)
  if shift_from is None:
    return plain
  return lambda t: schedule.shifted_logsnr(
    plain(t), resolution=resolution, base_resolution=shift_from
  )


def init_params(stage, key):
  """Fresh float32 parameters; `param_shapes` gives their shapes alone."""
  side = stage.crop or stage.resolution
  z = jnp.zeros((1, side, side, 3))
  level = jnp.zeros((1,))
  text = jnp.zeros((1, stage.text_len, stage.text_dim))
  mask = jnp.ones((1, stage.text_len), bool)
  extra = () if stage.low_resolution is None else (z, level)
  return stage.net.init(key, z, level, text, mask, *extra)['params']


def param_shapes(stage):
  """The shapes of `init_params`' result.

  Raises:
    UsageError: the values of `stage.net` do not make a network.
  """
  try:
    return jax.eval_shape(
      functools.partial(init_params, stage), jax.random.key(0)
    )
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UsageError(
      f'stage.net of {stage.name} does not make a network ({reason[:200]}); '
      'give one value per level where there are several, and widths that '
      'head_dim and norm_groups divide.'
    ) from error


def num_params(params):
  """How many numbers a parameter tree holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def multiple(stage):
  """Heights and widths of a stage's images are multiples of this."""
  if isinstance(stage.net, UNet):
    return 2 ** (len(stage.net.channel_mults) - 1)
  return math.prod(stage.net.strides)
