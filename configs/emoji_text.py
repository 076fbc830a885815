r"""A text encoder for the emoji scenes: `shapes_text` on other captions.

  python train.py --config emoji_text --workdir runs/emoji/text

684,288 parameters; 12 minutes on 2 cores busy with other work. Accuracy of a
linear probe at the nouns, in % on unseen captions | held-out pairs (an
untrained encoder in brackets):

  thing 99.9 | 99.9 (99.5 | 99.8)         count 100.0 | 100.0 (96.3 | 97.7)
  left/right of 100.0 | 100.0 (88.6 | 86.2)
  above/below 100.0 | 100.0 (80.3 | 76.0)
"""

from imagen_jax.configs import shapes_text


def get_config():
  """The demo's text encoder, pretrained on the captions of emoji."""
  config = shapes_text.get_config()
  config.data.kind = 'emoji'
  return config
