r"""The first super-resolution model of `icons_cpu_base`'s cascade: 32→64.

  python train.py --config icons_cpu_sr1 --workdir runs/icons_cpu/sr1

As `icons_sr1`, with fewer channels at 32×32 and one residual block less.

Cost: 2.54 M parameters; docs/icons.md has the times of a step.

Result: not trained yet.
"""

from imagen_jax.configs import icons_cpu_base, icons_sr1


def get_config():
  """The 32→64 stage of the icons cascade for a CPU."""
  config = icons_sr1.get_config()
  config.stage.net.update(channels=(24, 48, 96), num_res_blocks=(1, 1, 2))
  config.text.dtype = 'bfloat16'
  config.data.mixture = icons_cpu_base.MIXTURE
  config.train.num_steps = 20_000
  config.train.optimizer.decay = True
  return config
