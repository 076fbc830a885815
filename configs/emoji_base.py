r"""The base model of the emoji scenes: text → 64×64 (F.1, small).

  python train.py --config emoji_base --workdir runs/emoji/base

Scenes such as "two dogs to the left of a red car": one to five of fifty-six
objects, rendered with the system's colour emoji font (Noto Color Emoji; if it
is not found, `--config.data.path=FONT`), with counts, relations and
backgrounds, see `imagen_jax/worlds/emoji.py`. A tenth of the pairs is held out.
The text encoder is `emoji_text`'s, or a folder of T5 v1.1 weights.

Cost: a step of 128 images is 6.6e12 FLOPs (1.5e13 with 96 channels); use a GPU.

Result: trained for 1,344 steps only, see docs/emoji.md.
"""

from imagen_jax.configs import common


def get_config():
  """The base stage of the emoji cascade."""
  config = common.stage_run()
  config.stage.net = {
    'kind': 'unet',
    'channels': 64,
    'channel_mults': (1, 2, 3, 4),
    'num_res_blocks': (2, 2, 2, 2),
    'attention_resolutions': (16, 8),
    'head_dim': 64,
    'emb_channels': 256,
    'norm_groups': 32,
  }
  config.stage.schedule.update(logsnr_min=-12.0, logsnr_max=12.0)
  config.stage.prediction = 'v'
  config.stage.stratified = True
  config.stage.sampling.update(steps=64, guidance=2.0)
  config.text.update(path='runs/emoji/text', max_len=64)
  config.text.trained_by = 'emoji_text'
  config.data.kind = 'emoji'
  config.train.update(num_steps=50_000, batch_size=128)
  config.train.optimizer.update(learning_rate=3e-4, warmup=200, decay=False)
  config.train.optimizer.options = {'b1': 0.9, 'b2': 0.99}
  return config
