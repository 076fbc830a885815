r"""The base model of the icons cascade: text → 32×32 (F.1, small).

  python train.py --config icons_base --workdir runs/icons/base

Scenes such as "a 3D fox" or "two flat cars on a blue background": one to four
of 300 everyday things in two styles, with counts, relations, places, sizes and
backgrounds, see `imagen_jax/worlds/icons.py`. The icons come from packages in
`data.path`, the text encoder is all-MiniLM-L6-v2 of another package;
docs/icons.md says how to get them. The licences are those under which weights
may be given away.

For more, such as 1,000 things in four styles on a GPU:

  python train.py --config icons_base --workdir runs/icons/base \
      --config.data.things=1000 \
      --config.data.styles="('3D', 'flat', 'cartoon', 'shaded')" \
      --config.train.batch_size=512

Cost: 7.5 M parameters; a step of 32 images is 2.2e11 FLOPs, of which the text
encoder takes a tenth. All three stages have 13.3 M parameters.

Result: not trained yet.
"""

from imagen_jax.configs import common

# Weights trained on icons under these may be given away, with credit.
LICENCES = ('MIT', 'Apache-2.0', 'OFL-1.1', 'CC-BY-4.0', 'CC0-1.0')


def get_config():
  """The base stage of the icons cascade."""
  config = common.stage_run()
  config.stage.resolution = 32
  config.stage.net = {
    'kind': 'unet',
    'channels': 48,
    'channel_mults': (1, 2, 3),
    'num_res_blocks': (1, 1, 2),
    'attention_resolutions': (8,),
    'head_dim': 48,
    'emb_channels': 256,
    'norm_groups': 8,
  }
  config.stage.schedule.update(logsnr_min=-12.0, logsnr_max=12.0)
  config.stage.prediction = 'v'
  config.stage.stratified = True
  config.stage.sampling.update(steps=64, guidance=2.0)
  config.text.update(path='all-minilm-l6-v2', kind='bert', max_len=32)
  config.data.update(kind='icons', path='runs/material')
  config.data.update(styles=('3D', 'flat'), things=300, licences=LICENCES)
  config.train.update(num_steps=40_000, batch_size=32)
  config.train.ema_decay = 0.999  # for a short run
  config.train.optimizer.update(kind='muon', learning_rate=3e-3, warmup=200)
  config.train.optimizer.decay = False
  return config
