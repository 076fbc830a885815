r"""The demo's text encoder: a small T5 v1.1, pretrained on captions alone.

Imagen's finding is that a frozen encoder trained on text only is enough
(Section 2.1); T5-XXL does not fit into a demo, so this one is pretrained on
the captions of the shapes world, then frozen like the real one.

  python train.py --config shapes_text --workdir runs/shapes/text
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    {
      'kind': 'text',
      'seed': 0,
      # Who stands where takes longest to learn: half of the captions say so.
      'data': {
        'seed': 0,
        'num_scenes': {
          'single': 4_000,
          'pair': 6_000,
          'relation': 16_000,
          'count': 4_000,
          'fill': 4_000,
        },
      },
      'encoder': {
        'width': 128,
        'num_layers': 4,
        'num_heads': 4,
        'head_dim': 32,
        'mlp_dim': 256,
      },
      'decoder': {'num_layers': 2, 'num_heads': 4},
      'train': {
        'num_steps': 2000,
        'batch_size': 128,
        'learning_rate': 2e-3,
        'warmup': 200,
        'max_len': 40,
        # A share of the examples is span corruption, the rest descriptions.
        'span_share': 0.15,
        'span_density': 0.3,
        'mean_span': 2,
        # Of the descriptions, how many captions get words nobody knows.
        'stranger_share': 0.15,
        'log_every': 50,
      },
      # Captions the linear probe is fitted on, and tested on.
      'probe': {'num_fit': 4000, 'num_test': 2000},
    }
  )
