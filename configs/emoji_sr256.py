r"""Super-resolution of the emoji scenes: 64→256 (F.2, a quarter as wide).

  python train.py --config emoji_sr256 --workdir runs/emoji/sr256

Trained on crops of 128 pixels, as the paper's last stage is trained on crops.
It has no self-attention and generates whole images.

Result: trained for 2,562 steps only, see docs/emoji.md.
"""

from imagen_jax.configs import emoji_base


def get_config():
  """The super-resolution stage of the emoji cascade."""
  config = emoji_base.get_config()
  config.stage.update(name='sr256', resolution=256, low_resolution=64)
  config.stage.crop = 128
  config.stage.net = {
    'kind': 'efficient_unet',
    'channels': (32, 64, 128, 256),
    'num_res_blocks': (2, 4, 4, 4),
    'strides': (2, 2, 2, 2),
    'self_attention': (False, False, False, False),
    'text_attention': (False, False, False, True),
    'num_heads': 8,
    'emb_channels': 256,
    'norm_groups': 16,
  }
  config.stage.prediction = 'x'  # and levels up to 0.4: see `shapes_sr1`
  config.stage.max_level = 0.4
  config.stage.sampling.update(steps=32, guidance=1.0, aug_level=0.1)
  config.train.update(num_steps=50_000, batch_size=64)
  return config
