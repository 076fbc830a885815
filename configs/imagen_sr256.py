r"""The paper's 64→256 model: an Efficient U-Net of 592 M parameters (B.1, F.2).

  python train.py --config imagen_sr256 --workdir runs/imagen/sr256 \
      --config.data.path=DIR --config.text.path=T5-V1_1-XXL

Cost in the paper: 2.5 M steps of 2,048 images on 128 TPU v4 chips. Cost here:
`python plan.py --config imagen_sr256`, and docs/tpu.md.

Given in F.2: blocks of 128, 256, 512, 1024 channels with 2, 4, 8, 8 residual
blocks, each halving the side; attention to pixels and text with 8 heads at the
last; scale-shift norm, attention-pooled text, dropout 0; eps-prediction, cosine
schedule; Adam (0.9, 0.999, 1e-8), rate 1e-4, 10,000 warm-up steps; text dropped
for 10 % (4.1); low-resolution input with noise of a uniform level (2.4). As in
F.1 the listing's `end_value=2500000` must be 0.

The paper's "600 M" leaves details open. Chosen: each residual block of the
decoder is concatenated with one skip; a conditioning vector of 512; text
projected to 1,024 before K, V and the pooler, whose heads are as wide; the 1×1
shortcut of Figure A.27 on every block, also where the width does not change; of
the block that Figure A.30 has at 256×256 and the listing has not, the first
convolution's features and a 1×1 convolution that joins them to the last block's
(docs/results.md, section 5). This gives 591,985,667 parameters:

  encoder 237.8 M  (1024-channel blocks 167.9 M, their attention 12.6 M)
  decoder 345.6 M  (1024-channel blocks 251.8 M, their attention 12.6 M)
  time, level, pooled text 4.3 M, text projection 4.2 M

With raw 4,096-d text it would be 661.7 M, without the shortcuts 581.2 M.

Also chosen: 128 tokens, clip 1.0, EMA 0.9999, bfloat16; DDIM in 128 steps,
noise level 0.1 when sampling (the paper: 0 for the best FID, 0.1 to 0.3 for the
best-looking images). Guidance 8 is Table 1's.
"""

from imagen_jax.configs import imagen_base64
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The 64→256 stage, at the paper's size."""
  config = imagen_base64.get_config()
  config.stage.update(name='sr256', resolution=256, low_resolution=64)
  config.stage.net = {
    'kind': 'efficient_unet',
    'channels': (128, 256, 512, 1024),
    'num_res_blocks': (2, 4, 8, 8),
    'strides': (2, 2, 2, 2),
    'self_attention': (False, False, False, True),
    'text_attention': (False, False, False, True),
    'num_heads': 8,
    'emb_channels': 512,
    'text_width': 1024,
    'conv_shortcut': True,
    'dropout': 0.0,
    'norm_groups': 32,
    # Recomputes activations, not convolutions; docs/tpu.md compares.
    'remat': 'convs_saveable',
  }
  config.stage.sampling.update(sampler='ddim', steps=128, guidance=8.0)
  config.stage.sampling.aug_level = 0.1
  # "Adafactor hurt model quality" in the super-resolution models (4.1).
  config.train.optimizer.kind = 'adam'
  config.train.optimizer.options = {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8}
  return config
