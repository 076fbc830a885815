"""Speed of one guided call of an IF network: this project against diffusers.

  pip install 'imagen_jax[parity]'
  python benchmarks/deepfloyd.py [--side 32] [--batch 2] [--eager_only]

A narrow network of stage I's structure, with the same random weights on both
sides, in float32 on all CPU cores. Timed is the network evaluation of a
sampling step, with the conditional and unconditional halves in one batch. The
three implementations are interleaved, so other load affects all of them; the
printed times are medians.
"""

import argparse
import statistics
import sys
import time

import jax
import numpy as np
import torch
from flax.traverse_util import unflatten_dict

from imagen_jax import compiler
from imagen_jax.deepfloyd import config, unet, weights

RAW = {
  '_class_name': 'UNet2DConditionModel',
  'act_fn': 'gelu',
  'addition_embed_type': 'text',
  'addition_embed_type_num_heads': 8,
  'attention_head_dim': 32,
  'block_out_channels': [64, 128, 192, 256],
  'cross_attention_dim': 256,
  'cross_attention_norm': 'group_norm',
  'down_block_types': [
    'ResnetDownsampleBlock2D',
    'SimpleCrossAttnDownBlock2D',
    'SimpleCrossAttnDownBlock2D',
    'SimpleCrossAttnDownBlock2D',
  ],
  'encoder_hid_dim': 512,
  'in_channels': 3,
  'layers_per_block': 2,
  'mid_block_type': 'UNetMidBlock2DSimpleCrossAttn',
  'out_channels': 6,
  'resnet_time_scale_shift': 'scale_shift',
  'up_block_types': [
    'SimpleCrossAttnUpBlock2D',
    'SimpleCrossAttnUpBlock2D',
    'SimpleCrossAttnUpBlock2D',
    'ResnetUpsampleBlock2D',
  ],
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--side', type=int, default=32)
  parser.add_argument('--batch', type=int, default=2)
  parser.add_argument('--repeat', type=int, default=5)
  parser.add_argument(
    '--eager_only',
    action='store_true',
    help='without torch.compile, which takes minutes to compile',
  )
  args = parser.parse_args()

  import diffusers

  torch.manual_seed(0)
  net = diffusers.UNet2DConditionModel.from_config(RAW).eval()
  made = config.parse(RAW)
  module = unet.IFUNet(made)
  state = {name: x.numpy() for name, x in net.state_dict().items()}
  params = {
    path: weights.from_torch(name, state[name])
    for path in weights.leaves(weights.abstract_params(made))
    for name in [weights.torch_name(path)]
  }
  params = jax.device_put(unflatten_dict(params))

  rng = np.random.default_rng(0)
  rows = 2 * args.batch
  z = rng.normal(size=(rows, args.side, args.side, 3)).astype(np.float32)
  text = rng.normal(size=(rows, 77, 512)).astype(np.float32)
  t = np.full((rows,), 500.0, np.float32)
  given = [torch.from_numpy(x) for x in (z.transpose(0, 3, 1, 2).copy(), t)]
  given.append(torch.from_numpy(text))
  apply = jax.jit(
    lambda p, *xs: module.apply({'params': p}, *xs),
    compiler_options=compiler.sampling_options(),
  )

  def torch_call(model):
    with torch.no_grad():
      return model(*given, return_dict=False)[0].numpy()

  calls = {
    'this': lambda: np.asarray(apply(params, z, t, text)),
    'diffusers': lambda: torch_call(net),
  }
  if not args.eager_only:
    compiled = torch.compile(net)
    calls['torch.compile'] = lambda: torch_call(compiled)
  expected = calls['diffusers']()
  for name in list(calls):
    try:
      out = calls[name]()
    except Exception as error:  # no C++ compiler, an unknown Python
      print(f'{name} does not run here: {type(error).__name__}')
      del calls[name]
      continue
    if name == 'this':
      out = out.transpose(0, 3, 1, 2)
    print(f'{name}: off by {np.abs(out - expected).max():.1e}', file=sys.stderr)
  times = {name: [] for name in calls}
  for _ in range(args.repeat):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - start)
  count = sum(x.size for x in state.values())
  print(
    f'{count / 1e6:.1f} M parameters, {rows} rows of {args.side}², '
    f'{torch.get_num_threads()} threads'
  )
  own = statistics.median(times['this'])
  for name, values in times.items():
    seconds = statistics.median(values)
    print(f'{name:14} {seconds:.3f} s   ×{seconds / own:.2f}')


if __name__ == '__main__':
  main()
