r"""The icons' base model for a CPU: text → 32×32, 300 things in two styles.

  python train.py --config icons_cpu_base --workdir runs/icons_cpu/base

As `icons_base`, with another network: that of the super-resolution stages
(B.1), which computes at 16×16 and 8×8 only.

A U-Net on squares of 2×2 pixels learned less in the same time, and was not
kept. On AMX processors the encoder is faster in bfloat16.

Cost: 5.3 M parameters; docs/icons.md has the times of a step.

Result: not trained yet.
"""

from imagen_jax.configs import icons_base

# Mostly things alone: what 300 things look like is most of what is to learn.
MIXTURE = {'single': 0.7, 'count': 0.12, 'pair': 0.18}


def get_config():
  """The base stage of the icons cascade for a CPU."""
  config = icons_base.get_config()
  config.stage.net = {
    'kind': 'efficient_unet',
    'channels': (64, 144),
    'num_res_blocks': (1, 3),
    'strides': (2, 2),
    'self_attention': (False, True),
    'text_attention': (False, True),
    'num_heads': 4,
    'emb_channels': 256,
    'norm_groups': 8,
  }
  config.text.dtype = 'bfloat16'
  config.data.mixture = MIXTURE
  config.train.update(num_steps=24_000, batch_size=32)
  config.train.optimizer.decay = True
  return config
