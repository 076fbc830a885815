"""A `Stage` from its config, or from what a model folder says of it."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from imagen_jax import kinds
from imagen_jax.cascade.stage import WRONG, SamplingConfig, Stage, field_names
from imagen_jax.diffusion import schedule
from imagen_jax.diffusion.loss import WEIGHTINGS
from imagen_jax.diffusion.process import PREDICTIONS
from imagen_jax.diffusion.settings import SettingError
from imagen_jax.errors import ModelError, UsageError, check_choice
from imagen_jax.io.files import COPY_AGAIN
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.nets.network import Network
from imagen_jax.nets.remat import POLICIES
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
  kind = net.pop('kind', None)
  cls = kinds.find(kind, NETS, key='config.stage.net.kind', base=Network)
  _check_names('stage.net', net, field_names(cls))
  if kind in NETS:
    check_choice(
      'stage.net.remat',
      net.get('remat'),
      (None, *POLICIES),
      key='config.stage.net.remat',
    )
  _check_names('stage.sampling', chosen, field_names(SamplingConfig))
  logsnr_fn = make_schedule(**_section(config, 'schedule'))
  _check_names('stage', config, field_names(Stage))
  _check_values(config)
  filled = {'resolution': config['resolution'], 'dtype': dtype}
  net = {k: v for k, v in filled.items() if k in field_names(cls)} | net
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
  except (UsageError, *WRONG) as error:
    raise ModelError(
      f'the config of {record.path} cannot be used '
      f'({str(error).rstrip(".")}); if you have not changed it, {COPY_AGAIN}.'
    ) from error
  return stage


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
  """Pops a section of a config; lists become tuples, which are hashable."""
  return {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in dict(config.pop(name)).items()
  }


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
    (
      'crop',
      get('crop') is None or low is not None,
      'it has no effect without stage.low_resolution; set it to None',
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
  check_choice('stage.schedule.kind', kind, SCHEDULES)
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
