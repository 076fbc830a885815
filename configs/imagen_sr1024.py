r"""The paper's 256→1024 model: an Efficient U-Net of 584 M parameters (F.3).

  python train.py --config imagen_sr1024 --workdir runs/imagen/sr1024 \
      --config.data.path=DIR --config.text.path=T5-V1_1-XXL

Cost in the paper: 2.5 M steps of 2,048 crops on 128 TPU v4 chips. Cost here:
`python plan.py --config imagen_sr1024`, and docs/tpu.md.

Given in F.3: F.2's blocks without self-attention, the attention to the text
kept ("critical"); the linear schedule of 1,000 steps from 1e-4 to 0.02; trained
on 64→256 crops of 256→1024 images (2.5). All else as `imagen_sr256`.

The paper gives this model 400 M parameters, but the listing gives 583,588,867.
Its blocks are those of 64→256, whose residual blocks alone hold 545.5 M, and
leaving out the self-attention removes 8.4 M. With 4 instead of 8 blocks of
1,024 channels it would be 373.8 M.

  encoder 233.6 M  (1024-channel blocks 167.9 M, their attention 8.4 M)
  decoder 341.4 M  (1024-channel blocks 251.8 M, their attention 8.4 M)
  time, level, pooled text 4.3 M, text projection 4.2 M
"""

from imagen_jax.configs import imagen_sr256
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The 256→1024 stage, at the paper's size as printed."""
  config = imagen_sr256.get_config()
  config.stage.update(name='sr1024', resolution=1024, low_resolution=256)
  config.stage.crop = 256
  config.stage.net.self_attention = (False, False, False, False)
  config.stage.schedule = {
    'kind': 'linear',
    'beta_start': 1e-4,
    'beta_end': 0.02,
    'num_steps': 1000,
  }
  return config
