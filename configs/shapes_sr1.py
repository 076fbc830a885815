r"""The demo's first super-resolution model: 16→64 pixels (F.2 shrunk).

  python train.py --config shapes_sr1 --workdir runs/shapes/sr1

The low-resolution picture is the box mean of the large one, noised at a random
level (2.4), up to 0.4 instead of 1: the base model's pictures are better than
what the higher levels show, and a third of the loss comes from them.
x-prediction: the Efficient U-Net as F.2 prints it keeps no features at the full
resolution, so that a small one cannot give back the noise of single pixels,
which eps and v ask for. With v-prediction the same network was still grainy
after 1,500 steps, its loss at 0.16.

Levels up to 0.4, and Muon, because a small network then learns more in the
same time: `python benchmarks/first_steps.py --config shapes_sr1`. After 400
steps the error of x at level 0.1 was, in thousandths, at t = 0.1 and 1:

  13.2 and 57.9  levels to 1, Adam at 1e-3
   9.7 and 23.7  levels to 0.4, Adam at 1e-3 (8.7 and 23.1 at 2e-3)
   6.4 and 19.0  levels to 0.4, Muon at 1e-3
   4.7 and 15.7  levels to 0.4, Muon at 4e-3

Measured with an earlier form of that script, which read the scenes in order;
the script gives 4.7 and 15.3 for the last row. A step with Muon takes 1.1 to
1.3 times as long. A widest block of 96 channels with two residual blocks
learned no faster in 200 steps and cost half as much again.

`--config shapes_sr1:unet` has the base model's network instead, of as many
parameters, to compare with.

More than half of the scenes that it trains on have patterned things, instead of
an eighth: the pattern is what 16 pixels do not show. Most of those scenes have
two things, since that is where it fails.

The bundled weights: 5,000 steps of the world's own mixture at a constant rate,
then from the EMA 3,000 and 4,500 steps with a cosine to 0 on a mixture that was
half `fill` and had no `fill_pair` (this file as of 7b46af0, for the commands
below); 200,000 pictures in 117 minutes on 2 cores that were busy with tests as
well. Held out, each run in its own world: 0.0052 after the second, 0.0042 after
the third. Fed with true 16-pixel pictures, this stage and sr2 get 36 of 48
patterned scenes right (6 of the first 16 before); ten of the 12 others have two
things.

  python train.py --config shapes_sr1 --workdir runs/shapes/sr1b \
      --init_from runs/shapes/sr1 --config.data.seed=1 \
      --config.train.num_steps=3000 --config.train.optimizer.decay=True
  python train.py --config shapes_sr1 --workdir runs/shapes/sr1c \
      --init_from runs/shapes/sr1b --config.data.seed=2 \
      --config.train.num_steps=4500 --config.train.optimizer.decay=True
  python evaluate.py --suite shapes --from_truth --num 48 --categories fill
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
  # As many parameters, to compare with.
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
  config.stage.update(
    name='sr1',
    resolution=64,
    low_resolution=16,
  )
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
  config.train.optimizer.learning_rate = 4e-3
  config.train.optimizer.options.weight_decay = 0.1
  return config
