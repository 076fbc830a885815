"""CLIP's image and text encoders (Radford et al. 2021), for scores.

They end in the joint embedding space, see `nets.clip` for their layers.
"""

import dataclasses
import pathlib
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagen_jax.errors import ModelError
from imagen_jax.io import files
from imagen_jax.nets.clip import ClipTextTower, ClipTower

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipImage(ClipTower):
  """The image encoder: images to the joint embedding space.

  Attributes:
    image_size, patch_size: of the images, in pixels.
    projection_dim: width of the joint embedding space.
  """

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_attention_heads: int = 12
  image_size: int = 224
  patch_size: int = 32
  projection_dim: int = 512

  @nn.compact
  def __call__(self, image: Float[Array, 'b h w 3']) -> Float[Array, 'b d']:
    """`image` is normalised by `MEAN` and `STD`."""
    name, width = 'vision_model.embeddings', self.hidden_size
    patch = (self.patch_size, self.patch_size)
    x = jax.lax.conv_general_dilated(
      image,
      self.tensor(f'{name}.patch_embedding.weight', width, 3, *patch),
      patch,
      'VALID',
      dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
      precision='highest',
    ).reshape(len(image), -1, width)
    first = self.tensor(f'{name}.class_embedding', width)
    first = jnp.broadcast_to(first, (len(image), 1, width))
    x = jnp.concatenate([first, x], axis=1)
    x = x + self.tensor(f'{name}.position_embedding.weight', *x.shape[1:])
    x = self.norm('vision_model.pre_layrnorm', x)  # spelt so in the files
    for i in range(self.num_hidden_layers):
      x = self.layer(x, f'vision_model.encoder.layers.{i}.', causal=False)
    x = self.norm('vision_model.post_layernorm', x[:, 0])
    return self.linear('visual_projection', x, self.projection_dim, bias=False)


class ClipTextFeatures(ClipTextTower):
  """The text encoder: prompts to the joint embedding space.

  The features are read at the token `eos_token_id`.
  """

  projection_dim: int = 512
  eos_token_id: int = 49407

  @nn.compact
  def __call__(self, ids: Int[Array, 'b l']) -> Float[Array, 'b d']:
    x = self.inputs(ids)
    for i in range(self.num_hidden_layers):
      x = self.layer(x, f'{self.PREFIX}.{i}.')
    x = self.norm('text_model.final_layer_norm', x)
    # Old configs give 2 as eos; the real end token has the highest id.
    eos = self.eos_token_id
    end = ids if eos == 2 else (ids == eos).astype(jnp.int32)
    x = x[jnp.arange(len(ids)), end.argmax(1)]
    return self.linear('text_projection', x, self.projection_dim, bias=False)


def read_config(path: pathlib.Path) -> tuple[ClipImage, ClipTextFeatures]:
  """The image and text encoders of a `config.json`.

  Raises:
    ModelError: it is not the config of a CLIP model.
  """
  try:
    config = files.parse_json(path.read_text(encoding='utf-8-sig'))
    return (
      ClipImage(**_fields(ClipImage, config, 'vision_config')),
      ClipTextFeatures(**_fields(ClipTextFeatures, config, 'text_config')),
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ModelError(
      f'{path} is no config of a CLIP model ({error!r}); copy the whole '
      'folder of the model.'
    ) from error


def _fields(
  tower: type[ClipTower], config: dict[str, typing.Any], part: str
) -> dict[str, typing.Any]:
  """The attributes of a tower that its part of the config gives."""
  others = {'parent', 'name', 'dtype'}
  names = {f.name for f in dataclasses.fields(tower)} - others
  found = {k: v for k, v in config[part].items() if k in names}
  if found.get('hidden_act', 'gelu') not in ('quick_gelu', 'gelu'):
    raise ValueError(f'hidden_act {found["hidden_act"]}')
  return found | {'projection_dim': config.get('projection_dim', 512)}
