"""CLIP's two encoders (Radford et al. 2021), for scores only.

Parameters carry the names and layouts of the published Hugging Face tensors,
so a weights file is checked and used as it is. Not the text encoder of
Imagen, which is T5.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)


class _Named(nn.Module):
  """A module whose parameters have dotted names, all in one flat table."""

  def tensor(self, name, *shape):
    return self.param(name, nn.initializers.normal(0.02), shape)

  def linear(self, name, x, features, bias=True):
    weight = self.tensor(f'{name}.weight', features, x.shape[-1])
    x = jnp.dot(x, weight.T, precision='highest')
    return x + self.tensor(f'{name}.bias', features) if bias else x

  def norm(self, name, x, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    scale = self.tensor(f'{name}.weight', x.shape[-1])
    return x * scale + self.tensor(f'{name}.bias', x.shape[-1])

  def layer(self, name, x, sizes, causal):
    """One pre-norm block of attention and MLP: [B, L, D] -> [B, L, D]."""
    batch, length, width = x.shape
    h = self.norm(f'{name}.layer_norm1', x, sizes['eps'])
    q, k, v = (
      self.linear(f'{name}.self_attn.{part}_proj', h, width).reshape(
        batch, length, sizes['heads'], -1
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
    h = self.norm(f'{name}.layer_norm2', x, sizes['eps'])
    h = self.linear(f'{name}.mlp.fc1', h, sizes['mlp'])
    if sizes['act'] == 'quick_gelu':
      h = h * jax.nn.sigmoid(1.702 * h)
    else:
      h = jax.nn.gelu(h, approximate=False)
    return x + self.linear(f'{name}.mlp.fc2', h, width)


class ClipImage(_Named):
  """Images to the shared space.

  Attributes:
    sizes: width, mlp, layers, heads, act, eps, size and patch in pixels.
    projection: width of the shared space.
  """

  sizes: dict
  projection: int

  @nn.compact
  def __call__(self, image):
    """[B, size, size, 3], normalised by `MEAN` and `STD` -> [B, projection]."""
    s, top = self.sizes, 'vision_model'
    width, patch = s['width'], s['patch']
    name = f'{top}.embeddings'
    x = jax.lax.conv_general_dilated(
      image,
      self.tensor(f'{name}.patch_embedding.weight', width, 3, patch, patch),
      (patch, patch),
      'VALID',
      dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
      precision='highest',
    ).reshape(len(image), -1, width)
    first = self.tensor(f'{name}.class_embedding', width)
    first = jnp.broadcast_to(first, (len(image), 1, width))
    x = jnp.concatenate([first, x], axis=1)
    x = x + self.tensor(f'{name}.position_embedding.weight', *x.shape[1:])
    x = self.norm(f'{top}.pre_layrnorm', x, s['eps'])  # spelt so in the files
    for i in range(s['layers']):
      x = self.layer(f'{top}.encoder.layers.{i}', x, s, causal=False)
    x = self.norm(f'{top}.post_layernorm', x[:, 0], s['eps'])
    return self.linear('visual_projection', x, self.projection, bias=False)


class ClipText(_Named):
  """Sentences to the shared space.

  Attributes:
    sizes: width, mlp, layers, heads, act, eps, vocab, length and eos.
    projection: width of the shared space.
  """

  sizes: dict
  projection: int

  @nn.compact
  def __call__(self, ids):
    """[B, L] int32 -> [B, projection], read off at the end of each sentence."""
    s, top = self.sizes, 'text_model'
    name = f'{top}.embeddings'
    table = self.tensor(
      f'{name}.token_embedding.weight', s['vocab'], s['width']
    )
    place = self.tensor(
      f'{name}.position_embedding.weight', s['length'], s['width']
    )
    x = table[ids] + place[: ids.shape[1]]
    for i in range(s['layers']):
      x = self.layer(f'{top}.encoder.layers.{i}', x, s, causal=True)
    x = self.norm(f'{top}.final_layer_norm', x, s['eps'])
    # Old configs say eos is 2; in their vocabularies it has the highest id.
    end = ids if s['eos'] == 2 else (ids == s['eos']).astype(jnp.int32)
    x = x[jnp.arange(len(ids)), end.argmax(1)]
    return self.linear('text_projection', x, self.projection, bias=False)
