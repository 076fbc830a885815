"""A stage of the cascade: network, schedule, settings and parameters."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from imagen_jax import dtypes, kinds
from imagen_jax.diffusion import schedule
from imagen_jax.diffusion.loss import WEIGHTINGS, LossSpec
from imagen_jax.diffusion.process import PREDICTIONS
from imagen_jax.diffusion.samplers import SamplerSpec
from imagen_jax.diffusion.settings import SettingError
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io.files import COPY_AGAIN
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.nets.network import Network
from imagen_jax.typing import Array

# The networks of the paper; 'my_module:MyNet' names a user's own.
NETS = {
  'unet': 'imagen_jax.nets.unet:UNet',
  'efficient_unet': 'imagen_jax.nets.efficient_unet:EfficientUNet',
}
SCHEDULES: dict[str, Callable[..., Array]] = {
  'cosine': schedule.cosine_logsnr,
  'linear': schedule.linear_logsnr,
}

# What values of other types raise where they are used.
_WRONG = (
  ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip


def _part(cls: Any, whole: Any) -> Any:
  """A `cls` with the values that its fields have in `whole`."""
  return cls(**{name: getattr(whole, name) for name in _names(cls)})


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


def from_config(
  config: Mapping[str, Any],
  *,
  text_dim: int,
  text_len: int,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Stage:
  """Builds a `Stage` from a config's `stage` section.

  Args:
    config: name, resolution, low_resolution, net {kind, …}, schedule {kind,
      …}, and any other field of `Stage`; `sampling` holds `SamplingConfig`'s.
    text_dim: width of the text encoder's embeddings.
    text_len: number of text positions.
    dtype: of the activations.

  Raises:
    UsageError: a key is unknown or its value is invalid.
  """
  config = dict(config)
  net, chosen = _section(config, 'net'), _section(config, 'sampling')
  cls = kinds.find(
    net.pop('kind', None), NETS, key='config.stage.net.kind', base=Network
  )
  _check_names('stage.net', net, _names(cls))
  _check_names('stage.sampling', chosen, _names(SamplingConfig))
  logsnr_fn = make_schedule(**_section(config, 'schedule'))
  _check_names('stage', config, _names(Stage))
  _check_values(config)
  filled = {'resolution': config['resolution'], 'dtype': dtype}
  net = {k: v for k, v in filled.items() if k in _names(cls)} | net
  try:
    sampling = SamplingConfig(**chosen)
  except SettingError as error:
    raise UsageError(
      f'stage.sampling.{error}', key=f'config.stage.sampling.{error.field}'
    ) from error
  return Stage(
    net=cls(**net),
    logsnr_fn=logsnr_fn,
    sampling=sampling,
    text_dim=text_dim,
    text_len=text_len,
    **config,
  )


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
  """Pops a section of a config; lists become tuples, which are hashable."""
  return {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in dict(config.pop(name)).items()
  }


def _names(cls: Any) -> list[str]:
  return [field.name for field in dataclasses.fields(cls)]


def _check_names(
  where: str, given: Mapping[str, Any], known: Sequence[str]
) -> None:
  for key in given:
    if key not in known:
      raise UsageError(
        f'{where} has no key {key!r}{kinds.did_you_mean(key, known)} Its keys '
        f'are {", ".join(name for name in known if name != "parent")}.'
      )


def _check_values(config: Mapping[str, Any]) -> None:
  """Rejects values of `stage` that are invalid or have no effect."""
  get = lambda key: config.get(key, getattr(Stage, key, None))
  weightings = None, *WEIGHTINGS
  floor, weighting = get('contrast_floor'), get('weighting')
  side, low = get('resolution'), get('low_resolution')
  unit = side // low if low else 1
  rules = [
    (
      'name',
      re.fullmatch(r'\w[\w.-]*', str(get('name'))),
      'it is the name of a folder: letters, digits, _, - and .',
    ),
    (
      'low_resolution',
      low is None or (low < side and side % low == 0),
      f'it is a divisor of stage.resolution, {side}, and less',
    ),
    (
      'crop',
      get('crop') is None or (get('crop') <= side and get('crop') % unit == 0),
      f'it is at most stage.resolution, {side}, and a multiple of {unit}',
    ),
    ('prediction', get('prediction') in PREDICTIONS, _one_of(PREDICTIONS)),
    ('weighting', weighting in weightings, _one_of(weightings)),
    ('min_snr_gamma', get('min_snr_gamma') > 0, 'it is positive'),
    ('max_level', 0 <= get('max_level') <= 1, 'it lies in [0, 1]'),
    ('contrast_floor', floor is None or floor > 0, 'it is positive'),
    (
      'contrast_floor',
      floor is None or low is not None,
      'it has no effect without stage.low_resolution; set it to None',
    ),
  ]
  for key, needs in ('min_snr_gamma', 'min_snr'), ('sigmoid_bias', 'sigmoid'):
    used = weighting == needs or get(key) == getattr(Stage, key)
    rules.append((key, used, f'it needs stage.weighting={needs!r}'))
  for key, valid, rule in rules:
    if not valid:
      raise UsageError(f'stage.{key} is {get(key)!r}; {rule}.')


def _one_of(choices: Sequence[str | None]) -> str:
  return f'choose one of {", ".join(map(str, choices))}'


def make_schedule(
  kind: str,
  shift_from: int | None = None,
  resolution: int | None = None,
  shift_to: int | None = None,
  **options: Any,
) -> Callable[[Array], Array]:
  """A log-SNR function of t, optionally shifted.

  Args:
    kind: a name in `SCHEDULES`.
    shift_from: resolution for which the schedule is meant; None: no shift.
      The log-SNR is shifted by 2·log(shift_from/resolution).
    resolution: the stage's, with `shift_from`.
    shift_to: resolution from which the shift is at t = 0; it falls linearly to
      that from `shift_from` at t = 1. None: `shift_from` at every t.
    **options: of the schedule's function.

  Raises:
    UsageError: the kind or an option is unknown, or `resolution` is missing.
  """
  if kind not in SCHEDULES:
    raise UsageError(
      f'stage.schedule.kind is {kind!r}; it can be {" or ".join(SCHEDULES)}.'
    )
  _, *known = inspect.signature(SCHEDULES[kind]).parameters
  _check_names('stage.schedule', options, known)
  plain = functools.partial(SCHEDULES[kind], **options)
  defaults = inspect.signature(plain).parameters
  low, high = (defaults.get(f'logsnr_{end}') for end in ('min', 'max'))
  if low and high and low.default >= high.default:
    raise UsageError(
      f'stage.schedule.logsnr_min is {low.default}; it must be less than '
      f'logsnr_max, {high.default}.',
      key='config.stage.schedule.logsnr_min',
    )
  if shift_to is not None and (shift_from is None or shift_to < shift_from):
    raise UsageError(
      f'stage.schedule.shift_to is {shift_to}; it needs a '
      f'stage.schedule.shift_from of at most that, not {shift_from}.',
      key='config.stage.schedule.shift_to',
    )
  if shift_from is None:
    return plain
  if resolution is None:
    raise UsageError(
      'stage.schedule.shift_from needs stage.schedule.resolution; set it to '
      "the side of the stage's images.",
      key='config.stage.schedule.resolution',
    )
  if shift_to is None:
    return lambda t: schedule.shifted_logsnr(
      plain(t), resolution=resolution, base_resolution=shift_from
    )
  return lambda t: schedule.interpolated_logsnr(
    t, plain(t), resolution=resolution, noise=shift_from, image=shift_to
  )


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
  except _WRONG as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UsageError(
      f'stage.net of {stage.name} does not define a network ({reason[:200]}); '
      'give one value per level where there are several, and widths that '
      'head_dim and norm_groups divide.'
    ) from error


def from_record(record: StageRecord, dtype: DTypeLike) -> Stage:
  """The stage of a record, whose file may be another version's, or edited.

  Raises:
    ModelError: the record describes no stage.
  """
  try:
    stage = from_config(
      record.config['stage'],
      text_dim=record.text['dim'],
      text_len=record.text['max_len'],
      dtype=dtype,
    )
    # The stage's own are compared when a call has not chosen others.
    _ = float(stage.sampling.guidance), float(stage.sampling.aug_level)
  except (UsageError, *_WRONG) as error:
    raise ModelError(
      f'the config of {record.path} cannot be used '
      f'({str(error).rstrip(".")}); if you have not changed it, {COPY_AGAIN}.'
    ) from error
  return stage


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
