r"""The demo's text encoder: a small T5 v1.1, pretrained on captions alone.

Imagen's finding is that a frozen encoder trained on text only is enough
(Section 2.1); T5-XXL does not fit into a demo, so this one is pretrained on
the captions of the shapes world, then frozen like the real one.

  python train.py --config shapes_text --workdir runs/shapes/text

677,376 parameters, 1.36 MB in bfloat16; 20 minutes on 2 cores busy with other
work (80 to 700 captions/s; at 700, the 2,000 steps would take 6 minutes).
A linear probe at the nouns reads, in % of unseen captions | of held-out
combinations (an untrained one in brackets):

  colour 100.0 | 100.0 (86 | 90)   shape 100.0 | 100.0 (100 | 100)
  left/right of 100.0 | 100.0 (85 | 83)   above/below 100.0 | 100.0 (81 | 80)

Without the directional start of the distance bias (`pretrain.directions`) the
same probe read places at 79 to 87 %, after 3,500 steps as after 1,600.
"""

from imagen_jax.configs import common
from ml_collections import ConfigDict


def get_config():
  """The text encoder of the shapes cascade."""
  config = common.base()
  config.kind = 'text'
  del config.text
  # 'shapes', 'emoji' or a World of your own, and how many scenes of each split.
  config.data = ConfigDict(
    {
      'kind': 'shapes',
      'seed': 0,
      'num_scenes': 30_000,
      'num_eval_scenes': 2_000,
    }
  )
  # Of the T5 encoder.
  config.encoder = ConfigDict(
    {
      'width': 128,
      'num_layers': 4,
      'num_heads': 4,
      'head_dim': 32,
      'mlp_dim': 256,
    }
  )
  # Of the decoder, which is thrown away afterwards.
  config.decoder = ConfigDict({'num_layers': 2, 'num_heads': 4})
  config.tasks = ConfigDict(
    {
      # Tokens of a caption.
      'max_len': 40,
      # Fraction of the examples that is span corruption; the rest describes.
      'span_fraction': 0.15,
      # Fraction of the tokens that a span corruption leaves out.
      'span_density': 0.3,
      # Mean length of a span, in tokens.
      'mean_span': 2,
      # Fraction of the descriptions whose captions get out-of-vocabulary words.
      'oov_fraction': 0.15,
    }
  )
  config.train.update(num_steps=2000, batch_size=128, ema_decay=0.99)
  config.train.update(sample_every=500, max_bad_steps=20)
  config.train.optimizer.update(learning_rate=2e-3, warmup=200)
  return config
