r"""The demo's last super-resolution model: 64→256 pixels (F.3, small).

  python train.py --config shapes_sr2 --workdir runs/shapes/sr2

Source: Appendix F.3. Like the paper's 256→1024 model it has no self-attention,
keeps the attention to the text, trains on crops and generates whole images. It
adds the patterns, which 16 pixels cannot show.

Cost of the bundled weights: 109,440 crops in 70 minutes on 2 cores that also
ran tests. 1,840 steps of the default mixture, then from their EMA 3,500 steps
of a mixture that was half `fill` (this file as of 7b46af0), with a cosine to 0
and a held-out loss of 0.0027. Then, with features kept at full resolution,
1,500 steps of this file's mixture: 0.0031 after 500 of them, 0.0028 at the end.
Given true 16-pixel images, sr1 and sr2 get 382 of 384 scenes right:

  python train.py --config shapes_sr2 --workdir runs/shapes/sr2b \
      --init_from runs/shapes/sr2 --config.data.seed=1 \
      --config.train.num_steps=3500 --config.train.optimizer.decay=True
  python train.py --config shapes_sr2 --workdir runs/shapes/sr2v4 \
      --init_from runs/shapes/sr2b --config.data.seed=13 \
      --config.train.num_steps=1500 --config.train.optimizer.decay=True \
      --config.train.optimizer.learning_rate=3e-3
  python evaluate.py --suite shapes --from_truth --num 64
"""

from imagen_jax.configs import shapes_sr1


def get_config():
  """The 64→256 stage of the shapes cascade."""
  config = shapes_sr1.get_config()
  config.stage.update(name='sr2', resolution=256, low_resolution=64)
  config.stage.crop = 96
  config.stage.contrast_floor = None
  config.stage.net.update(
    channels=(16, 32, 48, 64),
    num_res_blocks=(1, 1, 1, 1),
    strides=(2, 2, 2, 2),
    self_attention=(False, False, False, False),
    text_attention=(False, False, False, True),
  )
  config.stage.sampling.update(steps=8, guidance=1.0)
  config.train.update(num_steps=4000, batch_size=16)
  config.train.optimizer.options = {}
  return config
