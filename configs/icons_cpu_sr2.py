r"""The last super-resolution model of `icons_cpu_base`'s cascade: 64→256.

  python train.py --config icons_cpu_sr2 --workdir runs/icons_cpu/sr2

As `icons_sr2`, with one residual block per level and fewer channels.

Cost: 1.42 M parameters; docs/icons.md has the times of a step.

Result: not trained yet.
"""

from imagen_jax.configs import icons_cpu_base, icons_sr2


def get_config():
  """The 64→256 stage of the icons cascade for a CPU."""
  config = icons_sr2.get_config()
  config.stage.net.update(
    channels=(16, 32, 48, 64), num_res_blocks=(1, 1, 1, 1)
  )
  config.text.dtype = 'bfloat16'
  config.data.mixture = icons_cpu_base.MIXTURE
  config.train.num_steps = 20_000
  config.train.optimizer.decay = True
  return config
