r"""Emoji scenes at 64×64: "two dogs to the left of a red car".

  python train.py --config emoji_base --workdir runs/emoji/base \
      --config.text.path=T5-V1_1-BASE

Fifty-six real things, drawn by the colour emoji font of the system (Noto Color
Emoji; `--config.data.path=FONT` where it is not found), one to five in a scene,
with counts, relations and backgrounds: `imagen_jax/data/emoji.py`. A tenth of
the pairs is never trained. The captions want a text encoder that has read
English: a folder of T5 v1.1 weights.

For a GPU. It was not trained: none was at hand. The scenes are tested, with a
font made for the test, and that this config makes a network.
"""

from imagen_jax.configs import folder64


def get_config():
  """The base stage of the emoji cascade."""
  config = folder64.get_config()
  config.data = {'kind': 'emoji', 'path': None, 'seed': 0}
  config.text.path = ''
  config.stage.net.channels = 96
  config.train.update(num_steps=50_000, batch_size=128)
  config.train.ema_decay = 0.9999
  return config
