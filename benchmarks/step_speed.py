r"""Speed of a training step on a CPU, for three ways to lay it out.

  python benchmarks/step_speed.py --config shapes_base
  python benchmarks/step_speed.py --config shapes_sr1 --steps 8

Times one step of a config three ways, all with the same FLOPs:

  as trained  as in train.py: the batch split over one virtual device per core,
              loops unrolled, our group normalisation
  one device  the same on one device, whose FLOPs XLA splits over the cores
  plain       one device, Flax's group normalisation, and the residual blocks of
              the Efficient U-Net in loops, as on a GPU or TPU; the base model
              has no loops

The three are interleaved, so other load affects all of them; the times are
medians. On 2 cores, relative to a step as trained:

              base    sr1    sr2
  one device  ×1.02  ×1.09  ×0.88
  plain       ×1.17  ×12.9  ×6.7

The super-resolution models gain from their unrolled blocks; the base model has
no loops and gains little. Its training became faster by 16 pixels instead of 32
(a quarter of the FLOPs), v-prediction and Muon, see `shapes_base`.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from unittest import mock

import flax.linen as nn
import jax

from imagen_jax import sharding
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.nets import efficient_unet, layers, unet
from imagen_jax.training.experiment import make_experiment
from imagen_jax.training.input import split_index, train_batches
from imagen_jax.training.program import make_program


@contextlib.contextmanager
def flax_norm():
  """Networks traced in this context use Flax's group normalisation."""
  with contextlib.ExitStack() as stack:
    for module in (layers, unet, efficient_unet):
      stack.enter_context(mock.patch.object(module, 'GroupNorm', nn.GroupNorm))
    yield


class Way:
  """One way to run a training step, with its own state."""

  def __init__(self, name, config, *, data, plain=False):
    self.name, self.seconds, self.plain = name, [], plain
    config = config.copy_and_resolve_references()
    config.mesh.data = data
    if plain and config.stage.net.kind == 'efficient_unet':
      with config.stage.net.unlocked():
        config.stage.net.unroll = False
    self.experiment = make_experiment(config)
    self.mesh = self.experiment.mesh
    self.program = make_program(self.experiment, self.mesh)
    first = self.experiment.start(self.program.shardings.params, None)
    self.state = self.program.first_state(first.params)
    self.frozen = self.experiment.load_frozen()

  def step(self, batch):
    """Runs one step and records its time."""
    batch = sharding.put_batch(batch, self.mesh)
    norm = flax_norm() if self.plain else contextlib.nullcontext()
    with jax.set_mesh(self.mesh), norm:
      start = time.perf_counter()
      self.state, metrics = self.program.step(self.state, batch, self.frozen)
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
    Way('as trained', config, data=-1),
    Way('one device', config, data=1),
    Way('plain', config, data=1, plain=True),
  ]
  batches = train_batches(ways[0].experiment, 0)
  stream = itertools.islice(batches, args.steps + 1)
  for batch in stream:
    for way in ways:
      way.step(split_index(batch)[0])
  print(f'{config.stage.name}, {len(jax.devices())} devices, steps of', end=' ')
  print(config.train.batch_size, 'images')
  best = statistics.median(ways[0].seconds[1:])
  for way in ways:
    seconds = statistics.median(way.seconds[1:])
    rate = config.train.batch_size / seconds
    print(
      f'{way.name:10}  {seconds:.3f} s  {rate:5.1f} images/s  '
      f'×{seconds / best:.2f}'
    )


if __name__ == '__main__':
  main()
