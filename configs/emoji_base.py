r"""Emoji scenes at 64×64: "two dogs to the left of a red car".

  python train.py --config emoji_base --workdir runs/emoji/base

Fifty-six real things, drawn by the colour emoji font of the system (Noto Color
Emoji; `--config.data.path=FONT` where it is not found), one to five in a scene,
with counts, relations and backgrounds: `imagen_jax/worlds/emoji.py`. A tenth of
the pairs is never trained. The text encoder is `emoji_text`'s, or a folder of
T5 v1.1 weights.

For a GPU: a step of 128 pictures is 6.6e12 operations (1.5e13 with 96
channels). Trained for 1,344 steps only: docs/emoji.md.
"""

from imagen_jax.configs import folder64


def get_config():
  """The base stage of the emoji cascade."""
  config = folder64.get_config()
  config.data = {'kind': 'emoji', 'path': None, 'seed': 0}
  config.text.path = 'runs/emoji/text'
  config.stage.net.channels = 64
  config.train.update(num_steps=50_000, batch_size=128)
  config.train.ema_decay = 0.9999
  return config
