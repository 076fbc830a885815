r"""The icons' base model for a CPU: text → 32×32, 300 things in two styles.

  python train.py --config icons_cpu_base --workdir runs/icons_cpu/base

As `icons_base`, with another network: that of the super-resolution stages
(B.1), which computes at 16×16 and 8×8 only.

A U-Net on squares of 2×2 pixels learned less in the same time, and was not
kept. The command prints 0.476 s a step of 32 images on 2 cores with these
variables (67 images/s), and 0.574 s without them:

  python benchmarks/first_steps.py --config icons_cpu_base --steps 100

Cost: 5.3 M parameters; the 24,000 steps take about 5 hours at that speed, and
twice that beside other work.

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
  # On a processor with AMX the encoder's products take a fifth of the time.
  config.text.dtype = 'bfloat16'
  config.data.mixture = MIXTURE
  config.train.update(num_steps=24_000, batch_size=32)
  config.train.optimizer.decay = True
  return config
