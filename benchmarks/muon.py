r"""How long the optimizer takes: Muon, optax's Muon and Adam, in turn.

  python benchmarks/muon.py --config shapes_base

Prints the milliseconds of an update of a config's parameters, in the layout of
CPU devices that `--config.mesh.cpu` gives (of all cores as one by default).
"""

import argparse
import statistics
import sys
import time

import jax
import optax

from imagen_jax import sharding
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.training import cpu_layout
from imagen_jax.training.experiment import make_experiment
from imagen_jax.training.muon import COEFFICIENTS, RMS
from imagen_jax.training.optimizer import matrix_axes, optimizer
from imagen_jax.training.program import make_program

RATE = 1e-3


def axes(tree):
  return jax.tree_util.tree_map_with_path(matrix_axes, tree)


KINDS = {
  'Muon': optimizer(RATE, kind='muon', clip=None),
  "optax's Muon": optax.contrib.muon(
    RATE,
    (COEFFICIENTS,) * 5,
    consistent_rms=RMS,
    muon_weight_dimension_numbers=axes,
  ),
  'Adam': optimizer(RATE, clip=None),
}


def main() -> None:
  plain, overrides = split_overrides(sys.argv[1:])
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', required=True)
  parser.add_argument('--turns', type=int, default=20)
  args = parser.parse_args(plain)
  sharding.set_cpu_devices()
  config = load_config(args.config, ['mesh.cpu=one_eigen', *overrides])
  if config.text.path == 'runs/shapes/text':
    config.text.path = 'demo'
  cpu_layout.settle(config, None)
  run = make_experiment(config)
  program = make_program(run, run.mesh)
  params = run.start(program.shardings.params, None).params
  with jax.set_mesh(run.mesh):
    made = {}
    for name, tx in KINDS.items():
      place = sharding.replicated(run.mesh)
      state = jax.device_put(tx.init(params), place)
      update = jax.jit(tx.update, out_shardings=place)
      jax.block_until_ready(update(params, state, params))  # compiles
      made[name] = update, state, []
    for _ in range(args.turns):
      for update, state, seconds in made.values():
        start = time.perf_counter()
        jax.block_until_ready(update(params, state, params))
        seconds.append(time.perf_counter() - start)
  print(f'{run.mesh.size} device(s); ms, median and minimum')
  for name, (_, _, seconds) in made.items():
    print(
      f'{name:12} {1e3 * statistics.median(seconds):7.1f} '
      f'{1e3 * min(seconds):7.1f}'
    )


if __name__ == '__main__':
  main()
