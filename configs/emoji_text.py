r"""A text encoder for the emoji scenes: `shapes_text` on other captions.

python train.py --config emoji_text --workdir runs/emoji/text
"""

from imagen_jax.configs import shapes_text


def get_config():
  config = shapes_text.get_config()
  config.data.kind = 'emoji'
  return config
