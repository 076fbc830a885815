r"""A 64×64 base model of your own images, each with a caption beside it.

  python train.py --config folder64 --workdir runs/mine/base \
      --config.data.path=DIR --config.text.path=T5-V1_1-LARGE

DIR holds images with `.txt` captions of the same name, or a
`metadata.jsonl`. For tars use `--config.data.kind=webdataset
--config.data.path='shards/*.tar'`, for the output of imagen-prepare
`--config.data.kind=arrayrecord`.

Cost: 25.8 M parameters; a step of 128 images is 6.6e12 FLOPs. One H100 trained
this network at 1,387 images/s while another run shared the GPU (docs/gpu.md):
2.6 hours for the 12.8 M images.

A smaller version of the paper's base model (F.1), except for:

  v-prediction  learns faster than eps and does not shift colours (Salimans and
                Ho 2022; Imagen Video, Ho et al. 2022); its unweighted error is
                the error of x times SNR + 1.
  Adam          Adafactor saves memory that this network does not need, and its
                rate, relative to a parameter's size, leaves zero-initialised
                layers at zero for 10,000 steps.
  2e-4          DDPM's rate for its 36 M network at the same batch and EMA
                (Ho et al. 2020).
  1,000 steps   of warm-up, about what Adam's b2 of 0.999 averages over; then a
                constant rate, so that a run can be extended at any time.

The schedule is the paper's cosine, with log-SNR limits of ±15 as
`diffusion/schedule.py` derives for 64×64.

No result was measured.
"""

from imagen_jax.configs import common
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """A base stage at the paper's resolution and a small width."""
  config = common.stage_run()
  config.stage.net = {
    'kind': 'unet',
    'channels': 64,
    'channel_mults': (1, 2, 3, 4),
    'num_res_blocks': (2, 2, 2, 2),
    'attention_resolutions': (16, 8),
    'head_dim': 64,
    'emb_channels': 256,
    'norm_groups': 32,
  }
  config.stage.prediction = 'v'
  config.stage.stratified = True
  # Between Table 1's 1.35, the best FID, and the 5 of Figure A.10.
  config.stage.sampling.guidance = 2.0
  # The demo's encoder is enough to try the command; real captions need T5 v1.1,
  # the larger the better (2.1).
  config.text.update(path='demo', max_len=64)
  config.train.update(num_steps=100_000, batch_size=128)
  config.train.optimizer.update(learning_rate=2e-4, warmup=1000, decay=False)
  return config
