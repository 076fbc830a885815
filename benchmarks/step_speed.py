r"""What a training step gains on a CPU from how it is laid out.

  python benchmarks/step_speed.py --config shapes_base
  python benchmarks/step_speed.py --config shapes_sr1 --steps 8

Times one step of a config three ways, all with the same operations:

  as trained  the batch split over one virtual device a core, loops unrolled,
              which is what train.py does
  one device  the same on one device, whose operations XLA splits over the cores
  plain       one device, and the residual blocks of the Efficient U-Net in
              loops, as a GPU or TPU runs them; the base model has no loops

The ways take turns, so that a busy machine is busy for all of them; the times
are medians. On 2 cores a step of sr1 took 1.31 times as long on one device as
it is trained, and 8.9 times as long plain.
"""

import argparse
import itertools
import statistics
import sys
import time

import jax

from imagen_jax import sharding
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.training.run import split_index
from imagen_jax.training.stage_run import StageRun


class Way:
  """One way to take a step, with a state of its own."""

  def __init__(self, name, config, *, data, unroll):
    self.name, self.seconds = name, []
    config = config.copy_and_resolve_references()
    config.mesh.data = data
    if not unroll:
      with config.stage.net.unlocked():
        config.stage.net.unroll = False
    self.run = StageRun(config)
    self.state, _ = self.run.first_state(None)

  def step(self, batch):
    """Takes one step and notes its time."""
    batch = sharding.put_batch(batch, self.run.mesh)
    with jax.set_mesh(self.run.mesh):
      start = time.perf_counter()
      self.state, metrics = self.run.step_fn(self.state, batch, self.run.frozen)
      jax.block_until_ready((self.state, metrics))
    self.seconds.append(time.perf_counter() - start)


def main():
  argv, overrides = split_overrides(sys.argv[1:])
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='shapes_base')
  parser.add_argument('--steps', type=int, default=8)
  args = parser.parse_args(argv)
  sharding.set_cpu_devices()
  config = load_config(args.config, overrides)
  if config.text.path == 'runs/shapes/text':
    config.text.path = 'demo'
  ways = [
    Way('as trained', config, data=-1, unroll=True),
    Way('one device', config, data=1, unroll=True),
  ]
  if config.stage.net.kind == 'efficient_unet':
    ways.append(Way('plain', config, data=1, unroll=False))
  stream = itertools.islice(ways[0].run.train_stream(0), args.steps + 1)
  for batch in stream:
    for way in ways:
      way.step(split_index(batch)[0])
  print(f'{config.stage.name}, {len(jax.devices())} devices, steps of', end=' ')
  print(config.train.batch_size, 'pictures')
  best = statistics.median(ways[0].seconds[1:])
  for way in ways:
    seconds = statistics.median(way.seconds[1:])
    rate = config.train.batch_size / seconds
    print(
      f'{way.name:10}  {seconds:.3f} s  {rate:5.1f} pictures/s  '
      f'×{seconds / best:.2f}'
    )


if __name__ == '__main__':
  main()
