"""CLIP's image and text encoders (Radford et al. 2021), for scores only.

Parameters have the names and layouts of the published Hugging Face tensors,
so a weights file is used without conversion. Imagen's text encoder is T5.
"""

import json
import pathlib
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagen_jax.errors import ModelError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)


class _Tower(nn.Module):
  """A pre-norm transformer; its parameters are flat, with dotted names.

  Attributes:
    width: of the residual stream.
    mlp: hidden width of each MLP.
    layers, heads: numbers of layers and of attention heads.
    act: 'quick_gelu' or 'gelu'.
    eps: of the layer norms.
    projection: width of the joint embedding space.
  """

  width: int
  mlp: int
  layers: int
  heads: int
  act: str
  eps: float
  projection: int

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
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
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
        batch, length, self.heads, -1
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
    h = self.linear(f'{name}.mlp.fc1', h, self.mlp)
    if self.act == 'quick_gelu':
      h = h * jax.nn.sigmoid(1.702 * h)
    else:
      h = jax.nn.gelu(h, approximate=False)
    return x + self.linear(f'{name}.mlp.fc2', h, width)


class ClipImage(_Tower):
  """The image encoder: images to the joint embedding space.

  Attributes:
    size: side of the images, in pixels.
    patch: side of a patch.
  """

  size: int
  patch: int

  @nn.compact
  def __call__(self, image: Float[Array, 'b h w 3']) -> Float[Array, 'b d']:
    """`image` is normalised by `MEAN` and `STD`."""
    name, patch = 'vision_model.embeddings', self.patch
    x = jax.lax.conv_general_dilated(
      image,
      self.tensor(
        f'{name}.patch_embedding.weight', self.width, 3, patch, patch
      ),
      (patch, patch),
      'VALID',
      dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
      precision='highest',
    ).reshape(len(image), -1, self.width)
    first = self.tensor(f'{name}.class_embedding', self.width)
    first = jnp.broadcast_to(first, (len(image), 1, self.width))
    x = jnp.concatenate([first, x], axis=1)
    x = x + self.tensor(f'{name}.position_embedding.weight', *x.shape[1:])
    x = self.norm('vision_model.pre_layrnorm', x)  # spelt so in the files
    for i in range(self.layers):
      x = self.layer(f'vision_model.encoder.layers.{i}', x, causal=False)
    x = self.norm('vision_model.post_layernorm', x[:, 0])
    return self.linear('visual_projection', x, self.projection, bias=False)


class ClipText(_Tower):
  """The text encoder: prompts to the joint embedding space.

  Attributes:
    vocab: size of the vocabulary.
    length: tokens of a prompt, padding included.
    eos: id of the token at which the features are read.
  """

  vocab: int
  length: int
  eos: int

  @nn.compact
  def __call__(self, ids: Int[Array, 'b l']) -> Float[Array, 'b d']:
    name = 'text_model.embeddings'
    table = self.tensor(
      f'{name}.token_embedding.weight', self.vocab, self.width
    )
    position = self.tensor(
      f'{name}.position_embedding.weight', self.length, self.width
    )
    x = table[ids] + position[: ids.shape[1]]
    for i in range(self.layers):
      x = self.layer(f'text_model.encoder.layers.{i}', x, causal=True)
    x = self.norm('text_model.final_layer_norm', x)
    # Old configs give 2 as eos; the real end token has the highest id.
    end = ids if self.eos == 2 else (ids == self.eos).astype(jnp.int32)
    x = x[jnp.arange(len(ids)), end.argmax(1)]
    return self.linear('text_projection', x, self.projection, bias=False)


# {our name: (their name, default: that of ViT-B/32)}.
_SHARED: dict[str, tuple[str, typing.Any]] = {
  'layers': ('num_hidden_layers', 12),
  'act': ('hidden_act', 'quick_gelu'),
  'eps': ('layer_norm_eps', 1e-5),
}
_VISION = _SHARED | {
  'width': ('hidden_size', 768),
  'mlp': ('intermediate_size', 3072),
  'heads': ('num_attention_heads', 12),
  'size': ('image_size', 224),
  'patch': ('patch_size', 32),
}
_TEXT = _SHARED | {
  'width': ('hidden_size', 512),
  'mlp': ('intermediate_size', 2048),
  'heads': ('num_attention_heads', 8),
  'vocab': ('vocab_size', 49408),
  'length': ('max_position_embeddings', 77),
  'eos': ('eos_token_id', 49407),
}


def read_config(path: pathlib.Path) -> tuple[ClipImage, ClipText]:
  """The image and text encoders of a `config.json`.

  Raises:
    ModelError: it is not the config of a CLIP model.
  """
  try:
    config = json.loads(path.read_text(encoding='utf-8'))
    sizes = [
      {ours: config[part].get(*theirs) for ours, theirs in names.items()}
      for part, names in (('vision_config', _VISION), ('text_config', _TEXT))
    ]
    acts = {s['act'] for s in sizes}
    if not acts <= {'quick_gelu', 'gelu'}:
      raise ValueError(f'hidden_act {acts}')
    projection = config.get('projection_dim', 512)
    vision, text = sizes
    return (
      ClipImage(**vision, projection=projection),
      ClipText(**text, projection=projection),
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ModelError(
      f'{path} is no config of a CLIP model ({error!r}); copy the whole '
      'folder of the model.'
    ) from error
