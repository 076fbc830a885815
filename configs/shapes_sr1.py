r"""The demo's first super-resolution model: 16→64 pixels (F.2, small).

  python train.py --config shapes_sr1 --workdir runs/shapes/sr1

Source: Appendix F.2, with these differences.

x-prediction: the Efficient U-Net of F.2 kept no features at full resolution
when these weights were begun, so it could not reproduce the noise of single
pixels, which eps and v require. With v-prediction it was still grainy after
1,500 steps, with a loss of 0.16. Now it keeps them (docs/results.md, section
5): the weights were converted, then trained on.

`max_level` 0.4 instead of 1 (2.4): the base model's samples are better than
images at higher levels, from which a third of the loss would come.

Muon, and levels up to 0.4, because a small network then learns more in the same
time: `python benchmarks/first_steps.py --config shapes_sr1`. After 400 steps
the error of x at level 0.1, × 1,000, at t = 0.1 and t = 1:

  13.2  57.9  levels to 1, Adam at 1e-3
   9.7  23.7  levels to 0.4, Adam at 1e-3 (8.7 and 23.1 at 2e-3)
   6.4  19.0  levels to 0.4, Muon at 1e-3
   4.7  15.7  levels to 0.4, Muon at 4e-3

These were measured with an earlier network (below) and an earlier form of the
script, which read the scenes in order. A step with Muon takes 1.1 to 1.3 times
as long. A widest block of 96 channels with two residual blocks learned no
faster in 200 steps and cost half as much again.

`--config shapes_sr1:unet` has the base model's architecture with as many
parameters, for comparison.

Text attention at 16×16 as well as at 8×8, and weight decay: an earlier network
of 728,099 parameters had attention at 8×8 only, one block per level and no
weight decay. After 18,500 steps it ignored that level: removing it changed
nothing, and the only text was the pooled vector, which cannot say which of two
objects is dotted. Given true 16-pixel images, it and sr2 got 39 of the 48
patterned scenes right; this network gets all 48, with the first command below
(46 if it takes 8 steps instead of 16).

`contrast_floor`: the loss of a blurred edge grows with the square of its
contrast, so white and pink objects on light backgrounds stayed blurred with
either network. Given true images, 90 of 96 single objects and 88 of 96 pairs
were right at 64 pixels without it, 95 and 92 with it, and 96 and 94 with the
bundled weights, in 8 steps: the second command.

  python evaluate.py --suite shapes --from_truth --num 48 --categories fill
  python evaluate.py --suite shapes --stages sr1 --from_truth --num 96 \
      --categories single,pair --batch_size 16

Mixture: a third of the scenes have patterned objects instead of an eighth,
because 16 pixels do not show the pattern.

Cost of the bundled weights: 233,744 images in 119 minutes on 2 cores. First
5,609 steps of a cosine over 12,000 (stopped there), with more than half of the
scenes patterned and no `contrast_floor`; then from the EMA 6,000 steps of this
file with a cosine to 0. Held-out loss, as this file computes it: 0.00051 after
500 steps of the second run, 0.00031 at its end. Then, with features kept at
full resolution, 3,000 steps more: 0.00040 after 500 of them, 0.00026 at the end
(of other scenes).

  python train.py --config shapes_sr1 --workdir runs/shapes/sr1v2 \
      --config.data.seed=10 --config.train.num_steps=12000 \
      --config.train.optimizer.decay=True --config.stage.contrast_floor=None \
      --config.data.mixture.single=0.08 --config.data.mixture.pair=0.1 \
      --config.data.mixture.relation=0.14 --config.data.mixture.count=0.13 \
      --config.data.mixture.fill=0.2 --config.data.mixture.fill_pair=0.35
  python train.py --config shapes_sr1 --workdir runs/shapes/sr1v3 \
      --init_from runs/shapes/sr1v2 --config.data.seed=11 \
      --config.train.optimizer.decay=True \
      --config.train.optimizer.learning_rate=3e-3
  python train.py --config shapes_sr1 --workdir runs/shapes/sr1v4 \
      --init_from runs/shapes/sr1v3 --config.data.seed=12 \
      --config.train.num_steps=3000 --config.train.optimizer.decay=True \
      --config.train.optimizer.learning_rate=3e-3
"""

from imagen_jax.configs import shapes_base

from imagen_jax.errors import UsageError

NETS = {
  'efficient_unet': {
    'channels': (24, 48, 64),
    'num_res_blocks': (2, 2, 1),
    'strides': (2, 2, 2),
    'self_attention': (False, False, True),
    'text_attention': (False, True, True),
    'num_heads': 4,
    'emb_channels': 128,
    'norm_groups': 8,
  },
  # The same number of parameters, for comparison.
  'unet': {
    'channels': 24,
    'channel_mults': (1, 1, 2, 2),
    'num_res_blocks': 1,
    'attention_resolutions': (8,),
    'head_dim': 16,
    'emb_channels': 88,
    'norm_groups': 8,
  },
}


def get_config(net='efficient_unet'):
  """The 16→64 stage of the shapes cascade, with one of `NETS`.

  Raises:
    UsageError: there is no such network.
  """
  if net not in NETS:
    raise UsageError(f'shapes_sr1:{net}: it can be {" or ".join(NETS)}.')
  config = shapes_base.get_config()
  config.stage.update(name='sr1', resolution=64, low_resolution=16)
  config.stage.net = {'kind': net, **NETS[net]}
  config.data.mixture = {
    'single': 0.12,
    'pair': 0.22,
    'relation': 0.16,
    'count': 0.15,
    'fill': 0.12,
    'fill_pair': 0.23,
  }
  config.stage.prediction = 'x'
  config.stage.max_level = 0.4
  config.stage.contrast_floor = 0.01
  config.stage.sampling.update(steps=16, guidance=1.0, aug_level=0.05)
  config.train.update(num_steps=6000, batch_size=16)
  config.train.ema_decay = 0.999
  config.train.optimizer.learning_rate = 4e-3
  config.train.optimizer.options.weight_decay = 0.1
  return config
