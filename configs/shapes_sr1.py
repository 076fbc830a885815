r"""The demo's first super-resolution model: 16→64 pixels (F.2 shrunk).

  python train.py --config shapes_sr1 --workdir runs/shapes/sr1

The low-resolution picture is the box mean of the large one, noised at a random
level (2.4), up to 0.4 instead of 1: the base model's pictures are better than
what the higher levels show, and a third of the loss comes from them.
x-prediction: the Efficient U-Net as F.2 prints it keeps no features at the full
resolution, so that a small one cannot give back the noise of single pixels,
which eps and v ask for. With v-prediction the same network was still grainy
after 1,500 steps, its loss at 0.16.

NOTES
"""

from imagen_jax.configs import shapes_base


def get_config():
  """The 16→64 stage of the shapes cascade."""
  config = shapes_base.get_config()
  config.stage.update(
    name='sr1',
    resolution=64,
    low_resolution=16,
  )
  config.stage.net = {
    'kind': 'efficient_unet',
    'channels': (24, 48, 64),
    'num_res_blocks': (1, 1, 1),
    'strides': (2, 2, 2),
    'self_attention': (False, False, True),
    'text_attention': (False, False, True),
    'num_heads': 4,
    'emb_channels': 128,
    'norm_groups': 8,
  }
  config.stage.prediction = 'x'
  config.stage.max_level = 0.4
  config.stage.sampling.update(steps=16, guidance=1.0, aug_level=0.05)
  config.train.update(num_steps=6000, batch_size=16)
  config.train.optimizer.learning_rate = 4e-3
  return config
