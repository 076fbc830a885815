r"""The first super-resolution model of the icons cascade: 32→64 (F.2, small).

  python train.py --config icons_sr1 --workdir runs/icons/sr1

As `shapes_sr1`, which has the reasons for x-prediction and levels up to 0.4.
64 is only twice 32, so that the last stage ends at 256, which is the size of
the icons of the style "3D".

Result: not trained yet.
"""

from imagen_jax.configs import icons_base


def get_config():
  """The 32→64 stage of the icons cascade."""
  config = icons_base.get_config()
  config.stage.update(name='sr1', resolution=64, low_resolution=32)
  config.stage.net = {
    'kind': 'efficient_unet',
    'channels': (32, 64, 96),
    'num_res_blocks': (1, 2, 2),
    'strides': (2, 2, 2),
    'self_attention': (False, False, True),
    'text_attention': (False, True, True),
    'num_heads': 4,
    'emb_channels': 192,
    'norm_groups': 8,
  }
  config.stage.prediction = 'x'
  config.stage.max_level = 0.4
  config.stage.sampling.update(steps=16, guidance=1.0, aug_level=0.05)
  config.train.update(num_steps=12_000, batch_size=16)
  config.train.optimizer.update(learning_rate=4e-3)
  config.train.optimizer.options.weight_decay = 0.1
  return config
