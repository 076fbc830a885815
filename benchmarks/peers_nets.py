"""The networks of `peers.py`'s rows, ours and imagen-pytorch's."""

import functools

import numpy as np

TEXT, WIDTH = 32, 256  # tokens of a caption, width of its embeddings
BASE = {
  'kind': 'unet',
  'channels': 64,
  'channel_mults': (1, 2, 3, 4),
  'num_res_blocks': 2,
  'attention_resolutions': (32, 16, 8),
  'head_dim': 64,
  'emb_channels': 256,
  'norm_groups': 32,
}
SR = {
  'kind': 'efficient_unet',
  'channels': (32, 64, 128, 256),
  'num_res_blocks': (1, 2, 4, 4),
  'strides': (2, 2, 2, 2),
  'self_attention': (False, False, False, True),
  'text_attention': (False, False, False, True),
  'num_heads': 8,
  'emb_channels': 256,
  'norm_groups': 32,
}
# imagen-pytorch's of the same sizes.
TORCH_BASE = {
  'dim': 64,
  'dim_mults': (1, 2, 3, 4),
  'num_resnet_blocks': 2,
  'layer_attns': (False, True, True, True),
  'layer_cross_attns': (False, True, True, True),
  'attn_heads': 8,
  'cond_dim': 256,
  'text_embed_dim': WIDTH,
}
TORCH_SR = {
  'dim': 24,
  'num_resnet_blocks': (1, 2, 4, 4),
  'attn_heads': 8,
  'cond_dim': 256,
  'text_embed_dim': WIDTH,
}


def config(side: int, low: int | None = None):
  """The config of a base or super-resolution stage."""
  from imagen_jax.configs import common

  made = common.stage_run()
  made.dtype = 'float32'
  made.stage.resolution, made.stage.low_resolution = side, low
  made.stage.net = dict(SR if low else BASE)
  # At 32² attention is at the same levels as at 64².
  if not low:
    scaled = [size * side // 64 for size in BASE['attention_resolutions']]
    made.stage.net.update(resolution=side, attention_resolutions=scaled)
  made.train.optimizer.update(kind='adam', learning_rate=1e-4, decay=False)
  return made


def stage(made):
  """The `Stage` of a config."""
  import jax.numpy as jnp

  from imagen_jax.cascade import stage_config

  return stage_config.from_config(
    made.stage.to_dict(), text_dim=WIDTH, text_len=TEXT, dtype=jnp.float32
  )


@functools.cache
def imagen_pytorch():
  """The module, which asks a server for T5's width when it is imported."""
  import transformers

  width = transformers.T5Config(d_model=WIDTH)
  real = transformers.T5Config.from_pretrained
  transformers.T5Config.from_pretrained = lambda *args, **options: width
  try:
    import imagen_pytorch
  finally:
    transformers.T5Config.from_pretrained = real
  return imagen_pytorch


def torch_imagen(side: int, low: int | None, steps: int = 100):
  """(an `Imagen`, the number of its network)."""
  peer = imagen_pytorch()
  common = {'timesteps': steps, 'text_embed_dim': WIDTH}
  if not low:
    nets, sizes = (peer.Unet(**TORCH_BASE),), (side,)
  else:
    nets = peer.NullUnet(), peer.SRUnet256(lowres_cond=True, **TORCH_SR)
    sizes = (low, side)
  return peer.Imagen(unets=nets, image_sizes=sizes, **common), len(nets)


def numbers(*shape: int) -> np.ndarray:
  """The same normal numbers for all."""
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)
