"""The hyper-parameters of a DeepFloyd IF U-Net: diffusers' `config.json`.

Fields have diffusers' names and defaults. Keys and values that are not
supported are refused by name: a network that ignored one would silently sample
noise.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from imagen_jax.errors import ModelError
from imagen_jax.io import files

WHAT = (
  "a DeepFloyd IF U-Net is a folder in diffusers' layout: config.json, "
  'diffusion_pytorch_model.safetensors'
)
DOWN = {'ResnetDownsampleBlock2D': False, 'SimpleCrossAttnDownBlock2D': True}
UP = {'ResnetUpsampleBlock2D': False, 'SimpleCrossAttnUpBlock2D': True}

# Keys and the values that this network supports, the default first.
FIXED = {
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
REQUIRED = (
  'mid_block_type',
  'resnet_time_scale_shift',
  'addition_embed_type',
)
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
  """The hyper-parameters of one IF U-Net, under diffusers' names.

  Attributes:
    sample_size: side of the images it was trained on.
    in_channels: 3, or 6 for a super-resolution stage.
    out_channels: 6: eps and the variance's interpolation; 3: eps alone, after
      fine-tuning without the variance.
    block_out_channels: width of each level, the highest resolution first.
    layers_per_block: residual blocks of each level in the encoder.
    down_attention, up_attention: whether each block has attention, in execution
      order (from `down_block_types`, `up_block_types`).
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

  sample_size: int | None
  in_channels: int
  out_channels: int
  block_out_channels: tuple[int, ...]
  layers_per_block: tuple[int, ...]
  down_attention: tuple[bool, ...]
  up_attention: tuple[bool, ...]
  attention_head_dim: tuple[int, ...]
  only_cross_attention: tuple[bool, ...]
  mid_block_only_cross_attention: bool
  cross_attention_dim: int
  encoder_hid_dim: int | None
  addition_embed_type_num_heads: int
  cross_attention_norm: str | None
  class_embed_type: str | None
  time_embedding_dim: int | None
  time_embedding_act_fn: str | None
  act_fn: str
  norm_num_groups: int
  norm_eps: float
  flip_sin_to_cos: bool
  freq_shift: float
  resnet_skip_time_act: bool
  resnet_out_scale_factor: float
  mid_block_scale_factor: float

  @property
  def emb_channels(self):
    """Width of the conditioning vector."""
    return self.time_embedding_dim or 4 * self.block_out_channels[0]

  @property
  def text_dim(self):
    """Width of the text embeddings that the network takes."""
    return self.encoder_hid_dim or self.cross_attention_dim

  @property
  def multiple(self):
    """Heights and widths must be multiples of this."""
    return 2 ** (len(self.block_out_channels) - 1)


def read(folder):
  """The `UNetConfig` of a checkpoint's folder.

  Raises:
    ModelError: there is no config.json, or it is another network's.
  """
  path = pathlib.Path(folder) / 'config.json'
  return parse(files.read_json(path, missing=WHAT), path)


def parse(raw, path='config.json'):
  """A `UNetConfig` from the JSON object; `path` is for error messages.

  Raises:
    ModelError: a key is unknown, or has a value that is not supported.
  """
  raw = dict(raw)
  for key, allowed in FIXED.items():
    missing = key not in raw and key in REQUIRED
    if missing or raw.get(key, allowed[0]) not in allowed:
      _refuse(path, key, raw.get(key), allowed)
    raw.pop(key, None)
  raw = {k: v for k, v in raw.items() if k not in UNUSED and k[0] != '_'}

  def take(key, default, *allowed):
    value = raw.pop(key, default)
    if allowed and value not in allowed:
      _refuse(path, key, value, allowed)
    return value

  channels = _numbers(path, 'block_out_channels', take, (320, 640, 1280, 1280))
  levels = len(channels)
  attention = {}
  for key, kinds in (('down_block_types', DOWN), ('up_block_types', UP)):
    names = take(key, ())
    if not isinstance(names, Sequence) or len(names) != levels:
      _refuse(path, key, names, (f'a list of {levels} block types',))
    for name in names:
      if name not in kinds:
        _refuse(path, key, name, tuple(kinds))
    attention[key] = tuple(kinds[name] for name in names)

  only = take('only_cross_attention', False)
  middle = take('mid_block_only_cross_attention', None, None, False, True)
  if isinstance(only, bool):
    middle, only = only if middle is None else middle, (only,) * levels
  if len(only) != levels or not all(isinstance(v, bool) for v in only):
    _refuse(path, 'only_cross_attention', only, ('one true or false a level',))

  result = UNetConfig(
    sample_size=take('sample_size', None),
    in_channels=take('in_channels', 4, 3, 6),
    out_channels=take('out_channels', 4, 3, 6),
    block_out_channels=channels,
    layers_per_block=_numbers(path, 'layers_per_block', take, 2, levels),
    down_attention=attention['down_block_types'],
    up_attention=attention['up_block_types'],
    attention_head_dim=_numbers(path, 'attention_head_dim', take, 8, levels),
    only_cross_attention=tuple(only),
    mid_block_only_cross_attention=bool(middle),
    cross_attention_dim=take('cross_attention_dim', 1280),
    encoder_hid_dim=take('encoder_hid_dim', None),
    addition_embed_type_num_heads=take('addition_embed_type_num_heads', 64),
    cross_attention_norm=take('cross_attention_norm', None, None, 'group_norm'),
    class_embed_type=take('class_embed_type', None, None, 'timestep'),
    time_embedding_dim=take('time_embedding_dim', None),
    time_embedding_act_fn=take(
      'time_embedding_act_fn', None, None, 'gelu', 'silu'
    ),
    act_fn=take('act_fn', 'silu', 'gelu', 'silu'),
    norm_num_groups=take('norm_num_groups', 32),
    norm_eps=take('norm_eps', 1e-5),
    flip_sin_to_cos=take('flip_sin_to_cos', True, True, False),
    freq_shift=take('freq_shift', 0),
    resnet_skip_time_act=take('resnet_skip_time_act', False, True, False),
    resnet_out_scale_factor=take('resnet_out_scale_factor', 1.0),
    mid_block_scale_factor=take('mid_block_scale_factor', 1),
  )
  if raw:
    raise ModelError(
      f'{path} has a key {sorted(raw)[0]!r} that this version of imagen_jax '
      'does not know; upgrade, or remove it if it changes nothing.'
    )
  _check_sizes(path, result)
  return result


def _check_sizes(path, config):
  """Refuses sizes that do not divide the widths they must divide."""
  for key in ('norm_num_groups', 'addition_embed_type_num_heads'):
    _divides(path, key, getattr(config, key))
  for key in ('cross_attention_dim', 'encoder_hid_dim', 'time_embedding_dim'):
    value = getattr(config, key)
    if value is not None or key == 'cross_attention_dim':
      _divides(path, key, value)
  for i, width in enumerate(config.block_out_channels):
    _divides(path, 'norm_num_groups', config.norm_num_groups, width)
    up = len(config.block_out_channels) - 1 - i
    for attends, size in (
      (config.down_attention[i], config.attention_head_dim[i]),
      (config.up_attention[up], config.attention_head_dim[up]),
    ):
      if attends:
        _divides(path, 'attention_head_dim', size, width)
  heads = config.addition_embed_type_num_heads
  _divides(path, 'addition_embed_type_num_heads', heads, config.text_dim)


def _divides(path, key, value, width=None):
  if not isinstance(value, int) or value < 1:
    _refuse(path, key, value, ('a whole number above 0',))
  if width is not None and width % value:
    _refuse(path, key, value, (f'a divisor of {width}',))


def _numbers(path, key, take, default, length=None):
  """A tuple of positive integers; one number applies to all levels."""
  value = take(key, default)
  if isinstance(value, int) and length is not None:
    value = (value,) * length
  good = isinstance(value, Sequence) and all(
    isinstance(n, int) and n > 0 for n in value
  )
  if not good or not value or (length is not None and len(value) != length):
    _refuse(path, key, value, ('whole numbers above 0, one a level',))
  return tuple(value)


def _refuse(path, key, value, allowed):
  choices = ' or '.join(str(choice) for choice in allowed)
  raise ModelError(
    f'{path} has {key} = {value!r} where a DeepFloyd IF U-Net has {choices}; '
    'give the unet folder of an IF stage.'
  )
