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

Cost of the bundled weights: 806,400 images in 386 minutes on 2 cores that also
ran tests.

  1. On the default mixture, 6,000 steps of 32 images with Adam at 1e-3 (loss
     0.076), then from their EMA 3,200 steps with Muon and a cosine to 0
     (held-out loss 0.0505, not comparable with the losses below).
  2. On this file's mixture, with more scenes that need composition and hardly
     any patterns (16 pixels do not show them), 8,000 steps: held-out loss
     0.0554 after 500 steps, 0.0448 at the end.
  3. The same again from the EMA: 0.0420.

The commands of 2 and 3, where BASE is the weights bundled at commit 43efb33:

  python train.py --config shapes_base --workdir runs/shapes/base4 \
      --init_from BASE --config.data.seed=2 \
      --config.train.optimizer.decay=True \
      --config.train.optimizer.learning_rate=1.5e-3
  python train.py --config shapes_base --workdir runs/shapes/base5 \
      --init_from runs/shapes/base4 --config.data.seed=4 \
      --config.train.optimizer.decay=True \
      --config.train.optimizer.learning_rate=1.5e-3

A constant rate of 3e-3 from the weights trained with Adam raised the loss, from
0.075 after 100 steps to 0.093 after 400.

Sampler: of 32 single objects at 64 pixels, 91 % were right with DDPM in 64
steps, 75 % and 81 % with DPM-Solver++ in 32 and 64. The noise added in every
step lets the network correct a wrong outline.

  python evaluate.py --suite shapes --num 32 --categories single \
      --stages base,sr1 --sampler ddpm,dpmpp --steps 64,16
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
    'num_res_blocks': (1, 2),
    'attention_resolutions': (8,),
    'head_dim': 32,
    'emb_channels': 192,
    'norm_groups': 8,
  }
  config.stage.schedule.update(logsnr_min=-12.0, logsnr_max=12.0)
  config.stage.prediction = 'v'
  config.stage.stratified = True
  config.stage.sampling.update(steps=64, guidance=2.0)
  config.text.update(path='runs/shapes/text', max_len=32)
  config.text.trained_by = 'shapes_text'
  config.data.kind = 'shapes'
  config.data.mixture = {
    'single': 0.12,
    'pair': 0.25,
    'relation': 0.33,
    'count': 0.25,
    'fill': 0.05,
  }
  config.train.update(num_steps=8000, batch_size=32)
  config.train.ema_decay = 0.999  # for a short run
  config.train.optimizer.update(kind='muon', learning_rate=3e-3, warmup=200)
  config.train.optimizer.decay = False
  return config
