r"""Error after the first few hundred training steps, to compare two configs.

  python benchmarks/first_steps.py --config shapes_sr1 --steps 400
  python benchmarks/first_steps.py --config shapes_sr1 --steps 400 \
      --config.stage.max_level=1

Prints the training loss and the error of the predicted image at several noise
levels, which is comparable across loss weightings: the mean square of x − x̃
over 64 held-out images, with the EMA parameters. A super-resolution stage gets
low-resolution images at augmentation level 0.1. The EMA decay is 0.99, because
the steps are few.
"""

import argparse
import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import sharding
from imagen_jax.cascade import conditioning
from imagen_jax.cli.configs import load_config, split_overrides
from imagen_jax.diffusion import process
from imagen_jax.training import cpu_layout
from imagen_jax.training.experiment import make_experiment
from imagen_jax.training.input import split_index, train_batches
from imagen_jax.training.program import make_program

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
LEVEL = 0.1
IMAGES = 64


def make_errors(run):
  """A jitted function: EMA parameters, frozen weights -> errors at `TIMES`."""
  source, stage = run.source('eval'), run.stage
  rows = [run.example(source[i]) for i in range(IMAGES)]
  batch = {
    key: jnp.asarray(np.stack([row[key] for row in rows])) for key in rows[0]
  }

  @jax.jit
  def errors(params, frozen):
    x = batch['image'].astype(np.float32) / 127.5 - 1
    text = run.condition(jax.random.key(0), batch, frozen)['text']
    extra = ()
    if stage.low_resolution is not None:
      low = conditioning.box_downsample(x, stage.low_resolution)
      level = jnp.full((IMAGES,), LEVEL)
      eps = jax.random.normal(jax.random.key(2), low.shape)
      extra = conditioning.low_res_input(stage, eps, low, level), level
    found = []
    for t in TIMES:
      logsnr = jnp.full((IMAGES,), stage.logsnr_fn(jnp.float32(t)))
      eps = jax.random.normal(jax.random.key(1), x.shape)
      z = process.diffuse(x, eps, logsnr)
      output = stage.net.apply(
        {'params': params}, z, logsnr, text, batch['mask'], *extra
      )
      guess = process.to_x(stage.prediction, output, z, logsnr)
      found.append(jnp.mean((jnp.clip(guess, -1, 1) - x) ** 2))
    return jnp.stack(found)

  return errors


def main():
  argv, overrides = split_overrides(sys.argv[1:])
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='shapes_sr1')
  parser.add_argument('--steps', type=int, default=400)
  parser.add_argument('--every', type=int, default=100)
  args = parser.parse_args(argv)
  sharding.set_cpu_devices()
  config = load_config(args.config, overrides)
  config.train.ema_decay = 0.99
  if config.text.path == 'runs/shapes/text':
    config.text.path = 'demo'
  said = cpu_layout.settle(config, None)
  if said:
    print(said)
  run = make_experiment(config)
  program = make_program(run, run.mesh)
  errors = make_errors(run)
  first = run.start(program.shardings.params, None)
  state, frozen = program.first_state(first.params), run.load_frozen()
  print('step  loss     s/step  1000 × error at t =', *TIMES)
  with jax.set_mesh(run.mesh):
    losses, seconds = [], []
    stream = itertools.islice(train_batches(run, 0), args.steps)
    for step, batch in enumerate(stream, 1):
      batch = sharding.put_batch(split_index(batch)[0], run.mesh)
      start = time.perf_counter()
      state, metrics = program.step(state, batch, frozen)
      losses.append(float(metrics['loss']))
      seconds.append(time.perf_counter() - start)
      if step % args.every == 0:
        found = 1000 * np.asarray(errors(state.ema_params, frozen))
        print(
          f'{step:4}  {np.mean(losses[-args.every :]):.4f}  '
          f'{np.median(seconds[1:]):.3f}  ',
          *(f'{value:.2f}' for value in found),
          flush=True,
        )


if __name__ == '__main__':
  main()
