r"""The demo's last super-resolution model: 64→256 (F.3 shrunk).

  python train.py --config shapes_sr2 --workdir runs/shapes/sr2

As the paper's 256→1024 model it has no self-attention, keeps the attention to
the text, trains on crops and draws whole pictures. It paints the fills, which
16 pixels cannot hold.

The bundled weights: 1,840 steps, 29,440 crops, 15 minutes on 2 cores; loss
0.0048. Behind sr1, fed with true 16-pixel pictures, the judge passes 63 of 64
pictures without fills and 6 of 16 with them, the last thing it learns:

  python evaluate.py --suite shapes --from_truth --num 16
"""

from imagen_jax.configs import shapes_sr1


def get_config():
  """The 64→256 stage of the shapes cascade."""
  config = shapes_sr1.get_config()
  config.stage.update(name='sr2', resolution=256, low_resolution=64)
  config.stage.crop = 96
  config.stage.net.update(
    channels=(16, 32, 48, 64),
    num_res_blocks=(1, 1, 1, 1),
    strides=(2, 2, 2, 2),
    self_attention=(False, False, False, False),
    text_attention=(False, False, False, True),
  )
  config.stage.sampling.update(steps=8, guidance=1.0)
  config.train.update(num_steps=4000, batch_size=16)
  return config
