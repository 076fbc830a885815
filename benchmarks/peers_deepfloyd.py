"""One guided evaluation of an IF network, as in `deepfloyd.py`."""

import numpy as np
from deepfloyd import RAW

ROWS = 4


def _inputs(side):
  rng = np.random.default_rng(0)
  z = rng.normal(size=(ROWS, side, side, 3)).astype(np.float32)
  text = rng.normal(size=(ROWS, 77, 512)).astype(np.float32)
  return z, np.full((ROWS,), 500.0, np.float32), text


def _ours(side):
  import jax

  from imagen_jax import compiler
  from imagen_jax.deepfloyd import config, unet

  module = unet.IFUNet(config.parse(RAW))
  inputs = _inputs(side)
  params = jax.jit(module.init)(jax.random.key(0), *inputs)
  apply = jax.jit(module.apply, compiler_options=compiler.sampling_options())
  return lambda: np.asarray(apply(params, *inputs))


def _diffusers(side, compiled=False):
  import diffusers
  import torch

  net = diffusers.UNet2DConditionModel.from_config(RAW).eval()
  net = torch.compile(net) if compiled else net
  z, t, text = (torch.from_numpy(x) for x in _inputs(side))
  z = z.permute(0, 3, 1, 2).contiguous()

  def work():
    with torch.no_grad():
      net(z, t, text, return_dict=False)

  return work


contenders = {
  'imagen_jax': _ours,
  'diffusers': _diffusers,
  'diffusers, torch.compile': lambda side: _diffusers(side, compiled=True),
}
