r"""The icons' base model for a CPU: text → 32×32, 300 things in two styles.

  export XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=individual_dot,reduce
  export JAX_NUM_CPU_DEVICES=1
  python train.py --config icons_cpu_base --workdir runs/icons_cpu/base

As `icons_base`, with another network: that of the super-resolution stages
(B.1), which computes at 16×16 and 8×8 only.

Of four networks of 5 to 6 M parameters this one was the fastest in a timed
step, and of the two that were trained for 90 s it learned more. On 2 cores, in
batches of 32 with v-prediction, it had then seen 6,400 images (71 images/s),
and the error of x at t = 0.1, 0.5 and 1, × 1,000, was 4.9, 38 and 164. The base
model's U-Net on squares of 2×2 pixels (64 channels at 16×16, 128 at 8×8; not
kept) had seen 4,600 (51 images/s), with errors of 8.1, 53 and 173. Waiting for
data took 1 % of the time, and embedding the captions in each step 2 %, so
neither is stored.

  python benchmarks/first_steps.py --config icons_cpu_base --steps 200

Cost: 5.3 M parameters. The 40,000 steps take about 5 hours at that speed, and 9
beside another training (39 images/s).

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
  config.data.mixture = MIXTURE
  config.train.update(num_steps=40_000, batch_size=32)
  config.train.optimizer.decay = True
  return config
