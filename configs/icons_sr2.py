r"""The last super-resolution model of the icons cascade: 64→256 (F.3, small).

  python train.py --config icons_sr2 --workdir runs/icons/sr2

Like the paper's 256→1024 model it has no self-attention and trains on crops.

Result: not trained yet.
"""

from imagen_jax.configs import icons_sr1


def get_config():
  """The 64→256 stage of the icons cascade."""
  config = icons_sr1.get_config()
  config.stage.update(name='sr2', resolution=256, low_resolution=64)
  config.stage.crop = 96
  config.stage.net.update(
    channels=(16, 32, 64, 96),
    num_res_blocks=(1, 1, 2, 2),
    strides=(2, 2, 2, 2),
    self_attention=(False, False, False, False),
    text_attention=(False, False, False, True),
  )
  config.stage.sampling.update(steps=8, guidance=1.0)
  config.train.update(num_steps=6000, batch_size=16)
  config.train.optimizer.options = {}
  return config
