r"""The demo's base model: text → 16×16 scenes of shapes (F.1, small).

  python train.py --config shapes_base --workdir runs/shapes/base

Source: Appendix F.1, with these differences. v-prediction, because
eps-prediction needs far more steps for the right colours. Muon: `shapes_sr1`.
The learning rate is constant, so that a run can be extended at any time.

Resolution: 16 pixels show nearly all of a scene at a quarter of the cost of 32,
and the super-resolution stages are conditioned on the caption too. `python
benchmarks/base_resolution.py` trains a small classifier on renders with noise
of 0.04. In scenes of five different shapes, each 4 to 5 pixels wide, it
recognises 98.9 % of the shapes at 16 pixels and 100.0 % at 32, and locates them
to 0.5 % and 0.2 % of the image.

Cost of the bundled weights: 2,214,400 images in 939 minutes on 2 cores that
also ran tests. In this order, each from the EMA of the one before:

  1. A network with (1, 2) blocks and attention at 8 pixels, 806,400 images in
     386 minutes: 6,000 steps of 32 images with Adam at 1e-3, then 19,200 with
     Muon and cosines to 0.
  2. base6: 8,000 steps of 64, half of them pairs and counts. Failures were
     then pairs and counts almost only: one thing too many or too few.
  3. base7: this file's network. Two blocks at 8 pixels and attention at 16
     were added to the trained one without changing its function (a block ends
     in a convolution that begins at zero), then 8,000 steps of 64.
  4. base8 and base9: failures were then scenes of five things (48 % wrong) and
     pairs of three (28 %; of two: 5 %), so `trio` and `crowd` were added to
     this file's mixture: twice 3,000 steps of 64.

  python train.py --config shapes_base --workdir runs/shapes/base8 \
      --init_from runs/shapes/base7 --config.data.seed=8 \
      --config.train.optimizer.decay=True \
      --config.train.optimizer.learning_rate=1.5e-3 \
      --config.train.num_steps=3000
  python train.py --config shapes_base --workdir runs/shapes/base9 \
      --init_from runs/shapes/base8 --config.data.seed=9 \
      --config.train.optimizer.decay=True \
      --config.train.optimizer.learning_rate=1.5e-3 \
      --config.train.num_steps=3000

A constant rate of 3e-3 from the weights trained with Adam raised the loss, from
0.075 after 100 steps to 0.093 after 400.

Sampler: of 32 single objects at 64 pixels, 91 % were right with DDPM in 64
steps, 75 % and 81 % with DPM-Solver++ in 32 and 64. The noise added in every
step lets the network correct a wrong outline.

  python evaluate.py --suite shapes --num 32 --categories single \
      --stages base,sr1 --sampler ddpm,dpmpp --steps 64,16

Steps: of 300 pairs and 300 counts at 64 pixels, the bundled weights get 93.0
and 91.3 % right in 16 steps, 91.7 and 93.7 % in 64: the same within chance. So
the stage was given 16 after its training, which had 64.

  python evaluate.py --suite shapes --stages base,sr1 --steps 16,8 --num 300 \
      --categories pair,count --batch_size 16
"""

from imagen_jax.configs import common


def get_config():
  """The base stage of the shapes cascade."""
  config = common.stage_run()
  config.stage.resolution = 16
  config.stage.net = {
    'kind': 'unet',
    'channels': 64,
    'channel_mults': (1, 1),
    'num_res_blocks': (1, 4),
    'attention_resolutions': (16, 8),
    'head_dim': 32,
    'emb_channels': 192,
    'norm_groups': 8,
  }
  config.stage.schedule.update(logsnr_min=-12.0, logsnr_max=12.0)
  config.stage.prediction = 'v'
  config.stage.stratified = True
  config.stage.sampling.update(steps=16, guidance=2.0)
  config.text.update(path='runs/shapes/text', max_len=32)
  config.text.trained_by = 'shapes_text'
  config.data.kind = 'shapes'
  config.data.mixture = {
    'single': 0.08,
    'pair': 0.15,
    'trio': 0.25,
    'relation': 0.2,
    'count': 0.1,
    'crowd': 0.2,
    'fill': 0.02,
  }
  config.train.update(num_steps=8000, batch_size=64)
  config.train.ema_decay = 0.9995  # for a short run
  config.train.optimizer.update(kind='muon', learning_rate=3e-3, warmup=200)
  config.train.optimizer.decay = False
  return config
