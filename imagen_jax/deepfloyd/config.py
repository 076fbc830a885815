"""The hyper-parameters of a DeepFloyd IF U-Net: diffusers' `config.json`.

Fields have diffusers' names and defaults. Keys and values that are not
supported are refused by name: a network that ignored one would silently sample
noise.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from imagen_jax.errors import ModelError
from imagen_jax.io import files

Path = str | pathlib.Path
WHAT = (
  "a DeepFloyd IF U-Net is a folder in diffusers' layout: config.json, "
  'diffusion_pytorch_model.safetensors'
)
# Whether a type of block has attention.
ATTENDS_DOWN = {
  'ResnetDownsampleBlock2D': False,
  'SimpleCrossAttnDownBlock2D': True,
}
ATTENDS_UP = {
  'ResnetUpsampleBlock2D': False,
  'SimpleCrossAttnUpBlock2D': True,
}
# Keys and the values that this network supports, the default first.
FIXED: dict[str, tuple] = {
  '_class_name': ('UNet2DConditionModel',),
  'mid_block_type': ('UNetMidBlock2DSimpleCrossAttn',),
  'resnet_time_scale_shift': ('scale_shift',),
  'addition_embed_type': ('text',),
  'time_embedding_type': ('positional',),
  'center_input_sample': (False,),
  'conv_in_kernel': (3,),
  'conv_out_kernel': (3,),
  'class_embeddings_concat': (False,),
  'encoder_hid_dim_type': (None, 'text_proj'),
  'num_attention_heads': (None,),
  'time_cond_proj_dim': (None,),
  'timestep_post_act': (None,),
  'dropout': (0, 0.0),
}
REQUIRED = ('mid_block_type', 'resnet_time_scale_shift', 'addition_embed_type')
MIDDLE = 'mid_block_only_cross_attention'
# Keys that change the network, and the values that they may have.
CHOICES: dict[str, tuple] = {
  'in_channels': (3, 6),
  'out_channels': (3, 6),
  MIDDLE: (False, True),
  'cross_attention_norm': (None, 'group_norm'),
  'class_embed_type': (None, 'timestep'),
  'time_embedding_act_fn': (None, 'gelu', 'silu'),
  'act_fn': ('gelu', 'silu'),
  'flip_sin_to_cos': (False, True),
  'resnet_skip_time_act': (False, True),
}
# Keys with one value per level, or one number for all: the default, and what a
# level may have; None: a whole number above 0.
PER_LEVEL: dict[str, tuple[Any, tuple | None]] = {
  'block_out_channels': ((320, 640, 1280, 1280), None),
  'layers_per_block': (2, None),
  'attention_head_dim': (8, None),
  'only_cross_attention': (False, (False, True)),
  'down_block_types': ((), tuple(ATTENDS_DOWN)),
  'up_block_types': ((), tuple(ATTENDS_UP)),
}
# Whole numbers above 0, or None where it is the default.
OPTIONAL = ('encoder_hid_dim', 'time_embedding_dim', 'sample_size')
SIZES = (
  *OPTIONAL,
  'norm_num_groups',
  'addition_embed_type_num_heads',
  'cross_attention_dim',
)
# Numbers, and whether they must be above 0.
NUMBERS = {
  'norm_eps': True,
  'freq_shift': False,
  'resnet_out_scale_factor': True,
  'mid_block_scale_factor': True,
}
# Keys of diffusers' class that have no effect on these block types.
UNUSED = {
  'addition_time_embed_dim',
  'attention_type',
  'downsample_padding',
  'dual_cross_attention',
  'num_class_embeds',
  'projection_class_embeddings_input_dim',
  'reverse_transformer_layers_per_block',
  'transformer_layers_per_block',
  'upcast_attention',
  'use_linear_projection',
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The hyper-parameters of one IF U-Net, with diffusers' names and defaults.

  Attributes:
    sample_size: side of the images it was trained on.
    in_channels: 3, or 6 for a super-resolution stage.
    out_channels: 6: eps and the variance's interpolation; 3: eps alone, after
      fine-tuning without the variance.
    block_out_channels: width of each level, the highest resolution first.
    layers_per_block: residual blocks of each level in the encoder.
    down_block_types, up_block_types: with or without attention, in execution
      order.
    attention_head_dim: size of a head, for each level.
    only_cross_attention: whether a level's pixels attend to the text alone.
    mid_block_only_cross_attention: likewise for the middle block.
    cross_attention_dim: width of the text in the attention layers.
    encoder_hid_dim: width of the text encoder; None: no projection.
    addition_embed_type_num_heads: heads of the text's attention pooling.
    cross_attention_norm: 'group_norm' or None.
    class_embed_type: 'timestep' where a network is conditioned on a noise
      level, else None.
    time_embedding_dim: width of the conditioning; None: 4 · the first width.
    time_embedding_act_fn: applied once to the conditioning vector, or None.
    act_fn: 'gelu' (the exact one) or 'silu'.
    norm_num_groups, norm_eps: of every GroupNorm of pixels.
    flip_sin_to_cos, freq_shift: of the sinusoidal features.
    resnet_skip_time_act: no activation before a block's projection of the
      conditioning.
    resnet_out_scale_factor, mid_block_scale_factor: divide residual sums.
  """

  block_out_channels: tuple[int, ...]
  layers_per_block: tuple[int, ...]
  down_block_types: tuple[str, ...]
  up_block_types: tuple[str, ...]
  attention_head_dim: tuple[int, ...]
  only_cross_attention: tuple[bool, ...]
  mid_block_only_cross_attention: bool
  sample_size: int | None = None
  in_channels: int = 4
  out_channels: int = 4
  cross_attention_dim: int = 1280
  encoder_hid_dim: int | None = None
  addition_embed_type_num_heads: int = 64
  cross_attention_norm: str | None = None
  class_embed_type: str | None = None
  time_embedding_dim: int | None = None
  time_embedding_act_fn: str | None = None
  act_fn: str = 'silu'
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  flip_sin_to_cos: bool = True
  freq_shift: float = 0
  resnet_skip_time_act: bool = False
  resnet_out_scale_factor: float = 1.0
  mid_block_scale_factor: float = 1

  @property
  def down_attention(self) -> tuple[bool, ...]:
    """Whether each encoder level has attention, in execution order."""
    return tuple(ATTENDS_DOWN[name] for name in self.down_block_types)

  @property
  def up_attention(self) -> tuple[bool, ...]:
    """Whether each decoder level has attention, in execution order."""
    return tuple(ATTENDS_UP[name] for name in self.up_block_types)

  @property
  def emb_channels(self) -> int:
    """Width of the conditioning vector."""
    return self.time_embedding_dim or 4 * self.block_out_channels[0]

  @property
  def text_dim(self) -> int:
    """Width of the text embeddings that the network takes."""
    return self.encoder_hid_dim or self.cross_attention_dim

  @property
  def multiple(self) -> int:
    """Heights and widths must be multiples of this."""
    return 2 ** (len(self.block_out_channels) - 1)


def read(folder: Path) -> UNetConfig:
  """The `UNetConfig` of a checkpoint's folder.

  Raises:
    ModelError: there is no config.json, or it is another network's.
  """
  path = pathlib.Path(folder) / 'config.json'
  return parse(files.read_json(path, missing=WHAT), path)


def parse(raw: Mapping[str, Any], path: Path = 'config.json') -> UNetConfig:
  """A `UNetConfig` from the JSON object; `path` is for error messages.

  Raises:
    ModelError: a key is unknown, or has a value that is not supported.
  """
  values = dict(raw)
  for key, fixed in FIXED.items():
    missing = key in REQUIRED and key not in values
    value = values.pop(key, fixed[0])
    if missing or value not in fixed:
      _refuse(path, key, None if missing else value, fixed)
  values = {k: v for k, v in values.items() if k not in UNUSED and k[0] != '_'}
  defaults: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(UNetConfig)
  }
  defaults |= {key: default for key, (default, _) in PER_LEVEL.items()}
  defaults[MIDDLE] = None  # as the levels, if they are all alike
  for key in sorted(values.keys() - defaults):
    raise ModelError(
      f'{path} has a key {key!r} that this version of imagen_jax does not '
      'know; upgrade, or remove it if it changes nothing.'
    )
  values = defaults | values
  if values[MIDDLE] is None:
    values[MIDDLE] = values['only_cross_attention'] is True
  for key, choices in CHOICES.items():
    if values[key] not in choices:
      _refuse(path, key, values[key], choices)
  channels = values['block_out_channels']
  levels = len(channels) if isinstance(channels, Sequence) else 0
  for key, (_, allowed) in PER_LEVEL.items():
    values[key] = _per_level(path, key, values[key], levels, allowed)
  config = UNetConfig(**values)
  _check_sizes(path, config)
  return config


def _whole(value: Any) -> bool:
  return isinstance(value, int) and value > 0


def _per_level(
  path: Path, key: str, value: Any, levels: int, allowed: tuple | None
) -> tuple:
  """A value of `PER_LEVEL` as a tuple of one per level."""
  if isinstance(value, int):
    value = (value,) * levels
  fits = isinstance(value, list | tuple) and 0 < len(value) == levels
  if not fits or not all(v in allowed if allowed else _whole(v) for v in value):
    choices = allowed or ('a whole number above 0',)
    _refuse(path, key, value, (*choices[:-1], f'{choices[-1]}, one per level'))
  return tuple(value)


def _check_sizes(path: Path, config: UNetConfig) -> None:
  """Refuses sizes that do not divide the widths they must divide."""
  for key in SIZES:
    value = getattr(config, key)
    if not (_whole(value) or (value is None and key in OPTIONAL)):
      _refuse(path, key, value, ('a whole number above 0',))
  for key, positive in NUMBERS.items():
    value = getattr(config, key)
    number = isinstance(value, int | float) and abs(value) < float('inf')
    if not number or (positive and value <= 0):
      _refuse(path, key, value, ('a number' + ' above 0' * positive,))
  channels, sizes = config.block_out_channels, config.attention_head_dim
  heads = config.addition_embed_type_num_heads
  divisors = [
    ('addition_embed_type_num_heads', heads, config.text_dim),
    ('attention_head_dim', sizes[-1], channels[-1]),  # the middle block's
  ]
  for i, width in enumerate(channels):
    divisors.append(('norm_num_groups', config.norm_num_groups, width))
    if config.down_attention[i]:
      divisors.append(('attention_head_dim', sizes[i], width))
    if config.up_attention[-1 - i]:
      divisors.append(('attention_head_dim', sizes[-1 - i], width))
  for key, value, width in divisors:
    if width % value:
      _refuse(path, key, value, (f'a divisor of {width}',))


def _refuse(path: Path, key: str, value: Any, allowed: Iterable) -> NoReturn:
  choices = ' or '.join(str(choice) for choice in allowed)
  raise ModelError(
    f'{path} has {key} = {value!r} where a DeepFloyd IF U-Net has {choices}; '
    'give the unet folder of an IF stage.'
  )
