"""CLIP's image and text encoders (Radford et al. 2021), for scores only.

Parameters have the names and layouts of the published Hugging Face tensors,
so a weights file is used without conversion. Imagen's text encoder is T5.
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

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)


class _Tower(nn.Module):
  """A pre-norm transformer; its parameters are flat, with dotted names.

  Attributes:
    projection_dim: width of the joint embedding space.

  The others are those of the published config, with the values of ViT-B/32 as
  defaults.
  """

  projection_dim: int
  hidden_size: int
  intermediate_size: int
  num_attention_heads: int
  num_hidden_layers: int = 12
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5

  def tensor(self, name: str, *shape: int) -> Array:
    return self.param(name, nn.initializers.normal(0.02), shape)

  def linear(
    self, name: str, x: Array, features: int, bias: bool = True
  ) -> Array:
    weight = self.tensor(f'{name}.weight', features, x.shape[-1])
    x = jnp.dot(x, weight.T, precision='highest')
    return x + self.tensor(f'{name}.bias', features) if bias else x

  def norm(self, name: str, x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.layer_norm_eps)
    scale = self.tensor(f'{name}.weight', x.shape[-1])
    return x * scale + self.tensor(f'{name}.bias', x.shape[-1])

  def layer(
    self, name: str, x: Float[Array, 'b l d'], causal: bool
  ) -> Float[Array, 'b l d']:
    """One block of attention and MLP."""
    batch, length, width = x.shape
    h = self.norm(f'{name}.layer_norm1', x)
    q, k, v = (
      self.linear(f'{name}.self_attn.{part}_proj', h, width).reshape(
        batch, length, self.num_attention_heads, -1
      )
      for part in 'qkv'
    )
    logits = jnp.einsum('bqhd,bkhd->bhqk', q, k, precision='highest')
    logits = logits * q.shape[-1] ** -0.5
    if causal:
      seen = jnp.tril(jnp.ones((length, length), bool))
      logits = jnp.where(seen, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    h = jnp.einsum('bhqk,bkhd->bqhd', weights, v, precision='highest')
    h = h.reshape(batch, length, width)
    x = x + self.linear(f'{name}.self_attn.out_proj', h, width)
    h = self.norm(f'{name}.layer_norm2', x)
    h = self.linear(f'{name}.mlp.fc1', h, self.intermediate_size)
    if self.hidden_act == 'quick_gelu':
      h = h * jax.nn.sigmoid(1.702 * h)
    else:
      h = jax.nn.gelu(h, approximate=False)
    return x + self.linear(f'{name}.mlp.fc2', h, width)


class ClipImage(_Tower):
  """The image encoder: images to the joint embedding space."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_attention_heads: int = 12
  image_size: int = 224
  patch_size: int = 32

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
      x = self.layer(f'vision_model.encoder.layers.{i}', x, causal=False)
    x = self.norm('vision_model.post_layernorm', x[:, 0])
    return self.linear('visual_projection', x, self.projection_dim, bias=False)


class ClipText(_Tower):
  """The text encoder: prompts to the joint embedding space.

  The features are read at the token `eos_token_id`.
  """

  hidden_size: int = 512
  intermediate_size: int = 2048
  num_attention_heads: int = 8
  vocab_size: int = 49408
  max_position_embeddings: int = 77
  eos_token_id: int = 49407

  @nn.compact
  def __call__(self, ids: Int[Array, 'b l']) -> Float[Array, 'b d']:
    name, width = 'text_model.embeddings', self.hidden_size
    table = self.tensor(
      f'{name}.token_embedding.weight', self.vocab_size, width
    )
    position = self.tensor(
      f'{name}.position_embedding.weight', self.max_position_embeddings, width
    )
    x = table[ids] + position[: ids.shape[1]]
    for i in range(self.num_hidden_layers):
      x = self.layer(f'text_model.encoder.layers.{i}', x, causal=True)
    x = self.norm('text_model.final_layer_norm', x)
    # Old configs give 2 as eos; the real end token has the highest id.
    eos = self.eos_token_id
    end = ids if eos == 2 else (ids == eos).astype(jnp.int32)
    x = x[jnp.arange(len(ids)), end.argmax(1)]
    return self.linear('text_projection', x, self.projection_dim, bias=False)


def read_config(path: pathlib.Path) -> tuple[ClipImage, ClipText]:
  """The image and text encoders of a `config.json`.

  Raises:
    ModelError: it is not the config of a CLIP model.
  """
  try:
    config = files.parse_json(path.read_text(encoding='utf-8-sig'))
    return (
      ClipImage(**_fields(ClipImage, config, 'vision_config')),
      ClipText(**_fields(ClipText, config, 'text_config')),
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ModelError(
      f'{path} is no config of a CLIP model ({error!r}); copy the whole '
      'folder of the model.'
    ) from error


def _fields(
  tower: type[_Tower], config: dict[str, typing.Any], part: str
) -> dict[str, typing.Any]:
  """The attributes of a tower that its part of the config gives."""
  names = {f.name for f in dataclasses.fields(tower)} - {'parent', 'name'}
  found = {k: v for k, v in config[part].items() if k in names}
  if found.get('hidden_act', 'gelu') not in ('quick_gelu', 'gelu'):
    raise ValueError(f'hidden_act {found["hidden_act"]}')
  return found | {'projection_dim': config.get('projection_dim', 512)}
