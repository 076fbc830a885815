r"""The paper's 64×64 base model: 2.26 B parameters (Sections 2.5, 4.1, F.1).

  python train.py --config imagen_base64 --workdir runs/imagen/base64 \
      --config.data.path=DIR --config.text.path=T5-V1_1-XXL

Cost in the paper: 2.5 M steps of 2,048 images on 256 TPU v4 chips. Cost here:
`python plan.py --config imagen_base64`, and docs/tpu.md.

Given in F.1: embed_dim 512, channel_mult 1 2 3 4, 3 residual blocks, attention
and text at 32, 16, 8 with heads of 64, BigGAN blocks, scale-shift norm,
attention-pooled text, dropout 0; eps-prediction, cosine schedule; Adafactor
with optax's defaults, rate 1e-4, 10,000 warm-up steps, cosine decay; text
dropped for 10 % (4.1). The listing's `end_value=2500000` is the number of steps
in the wrong place: as printed, the rate would rise to 2.5 million; here it
falls to 0. `lrs` and `weight_decay` are not arguments of optax.adafactor.

Chosen, because the paper does not say: one skip per residual block and a 4th
block in the decoder (ADM, which F.1 adapts); a conditioning vector of 4 × 512;
text projected to that width before K, V and the pooler. This gives
2,263,427,075 parameters (raw 4,096-d text: 2.44 B; projected to 512: 2.14 B):

  encoder  698.4 M      decoder               1,341.6 M
  middle   193.0 M      time and pooled text     22.0 M
                        text projection           8.4 M

Also chosen: 128 tokens, clip 1.0, EMA 0.9999, bfloat16, ancestral sampling in
256 steps with gamma 0.3. Guidance 1.35 is Table 1's (the best FID); the images
of Figure A.10 use 5.

T5-XXL is read from a folder in Hugging Face layout (google/t5-v1_1-xxl:
config.json, safetensors, spiece.model). Adafactor factors all large kernels:
its state is 3.4 M numbers. Its rate is relative to a parameter's size, so
zero-initialised layers stay near zero for 10,000 steps; for a short run set
`multiply_by_parameter_scale` to False in its options.
"""

from imagen_jax.configs import common
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The base stage, at the paper's size."""
  config = common.stage_run()
  config.dtype = 'bfloat16'
  config.stage.name = 'base64'
  config.stage.net = {
    'kind': 'unet',
    'channels': 512,
    'channel_mults': (1, 2, 3, 4),
    'num_res_blocks': 3,
    'attention_resolutions': (32, 16, 8),
    'head_dim': 64,
    'emb_channels': 2048,
    'text_width': 2048,
    'dropout': 0.0,
    'norm_groups': 32,
    # Recomputes activations, not convolutions; docs/tpu.md compares.
    'remat': 'convs_saveable',
  }
  config.stage.sampling.guidance = 1.35
  config.text.update(path='t5-v1_1-xxl', dtype='bfloat16')
  config.train.update(num_steps=2_500_000, batch_size=2048)
  # A long run: longer intervals; every 100,000 steps a checkpoint for good.
  config.train.update(log_every=100, checkpoint_every=5000, eval_every=5000)
  config.train.update(sample_every=10_000, keep_every=100_000)
  config.train.update(startup_seconds=7200.0, hang_seconds=3600.0)
  config.train.optimizer.kind = 'adafactor'
  config.mesh.fsdp = 8
  return config
