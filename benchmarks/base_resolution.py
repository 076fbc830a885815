"""Can five things still be told apart at the base model's resolution?

What cannot be read at the resolution of the base stage is lost to the
super-resolution stages. Here a small convolutional network sees the
neighbourhood of one of five things of mixed shapes in an image of 16 or 32
pixels with a little pixel noise, at a position known to ±0.04 of the image, and
predicts the thing's shape and exact position. Network and budget are the same
for each resolution, so only the information in the pixels differs.

  python benchmarks/base_resolution.py [--sizes 16,32] [--steps 800]

Takes 2 to 3 minutes per resolution on two CPU cores.
"""

import argparse
import dataclasses
import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from imagen_jax.worlds import captions
from imagen_jax.worlds.shapes import render, scene

WINDOW, GRID, JITTER = 0.4, 20, 0.04  # of the image; samples; of the image


def five_things(seed, i):
  """A scene of five things of mixed shapes."""
  rng = random.Random(f'base resolution {seed} {i}')
  j = i * 64
  while len((s := scene(seed, 'eval', j, category='count')).things) != 5:
    j += 1
  things = [
    dataclasses.replace(t, shape=captions.pick(rng, captions.SHAPES))
    for t in s.things
  ]
  return dataclasses.replace(s, things=tuple(things))


def examples(seed, num, size, noise):
  """Noisy images, and the shapes and positions of their things.

  Returns:
    images float32 [num, size, size, 3], shapes int32 [num, 5], positions
    float32 [num, 5, 2] as (x, y).
  """
  rng = np.random.default_rng(seed)
  scenes = [five_things(seed, i) for i in range(num)]
  # Rendered at 128 and box-averaged, like the cascade's low-resolution images.
  k = 128 // size
  images = np.stack(
    [
      render(s, 128).reshape(size, k, size, k, 3).mean((1, 3)) / 255
      for s in scenes
    ]
  )
  images += noise * rng.standard_normal(images.shape)
  shapes = [[captions.SHAPES.index(t.shape) for t in s.things] for s in scenes]
  places = [[(t.x, t.y) for t in s.things] for s in scenes]
  return (
    images.astype(np.float32),
    np.array(shapes, np.int32),
    np.array(places, np.float32),
  )


def windows(images, centres):
  """Bilinear samples [B, GRID, GRID, 3] of windows around centres [B, 2]."""
  size = images.shape[1]
  steps = (jnp.arange(GRID) + 0.5) / GRID - 0.5

  def one(image, centre):
    x = (centre[0] + WINDOW * steps) * size - 0.5
    y = (centre[1] + WINDOW * steps) * size - 0.5
    at = jnp.meshgrid(y, x, indexing='ij')
    return jax.vmap(
      lambda c: jax.scipy.ndimage.map_coordinates(c, at, 1, mode='nearest'),
      in_axes=-1,
      out_axes=-1,
    )(image)

  return jax.vmap(one)(images, centres)


class Reader(nn.Module):
  """Window [B, GRID, GRID, 3] -> logits of the shape, offset of the centre."""

  @nn.compact
  def __call__(self, x):
    for i, width in enumerate((32, 64, 64)):
      x = nn.Conv(width, (3, 3), (1, 1) if i == 0 else (2, 2))(x)
      x = nn.gelu(nn.LayerNorm()(x))
    x = nn.gelu(nn.Dense(128)(x.reshape(len(x), -1)))
    return nn.Dense(len(captions.SHAPES))(x), nn.Dense(2)(x)


def measure(size, *, steps, num_train, num_test, noise, batch=128):
  """(accuracy per shape, of all five, rms position error) at one resolution."""
  train = examples(1, num_train, size, 0)  # noise is added afresh below
  test = examples(2, num_test, size, noise)
  reader = Reader()
  params = reader.init(jax.random.key(0), jnp.zeros((1, GRID, GRID, 3)))
  optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), b2=0.99)

  def read(params, images, places, jitter):
    x = windows(images, places + jitter)
    logits, offset = reader.apply(params, (x - 0.5) * 2)
    return logits, offset * JITTER

  def loss(params, images, shapes, places, jitter):
    logits, offset = read(params, images, places, jitter)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, shapes)
    return nll.mean() + jnp.square((offset + jitter) / JITTER).mean()

  @jax.jit
  def step(params, state, key, images, shapes, places):
    key, noise_key = jax.random.split(key)
    jitter = jax.random.uniform(
      key, places.shape, minval=-JITTER, maxval=JITTER
    )
    fresh = noise * jax.random.normal(noise_key, images.shape)
    grads = jax.grad(loss)(params, images + fresh, shapes, places, jitter)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  rng = np.random.default_rng(0)
  for i in range(steps):
    b, t = rng.integers(num_train, size=batch), rng.integers(5, size=batch)
    params, state = step(
      params,
      state,
      jax.random.fold_in(jax.random.key(1), i),
      train[0][b],
      train[1][b, t],
      train[2][b, t],
    )
  right, error = [], []
  for t in range(5):
    jitter = rng.uniform(-JITTER, JITTER, (num_test, 2)).astype(np.float32)
    logits, offset = jax.jit(read)(params, test[0], test[2][:, t], jitter)
    right.append(np.argmax(logits, -1) == test[1][:, t])
    error.append(np.square(offset + jitter).mean())
  right = np.array(right)
  return right.mean(), right.all(0).mean(), np.sqrt(np.mean(error))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sizes', default='16,32')
  parser.add_argument('--steps', type=int, default=800)
  parser.add_argument('--num_train', type=int, default=6000)
  parser.add_argument('--num_test', type=int, default=1000)
  parser.add_argument(
    '--noise',
    type=float,
    default=0.04,
    help='standard deviation, in [0, 1] pixel units',
  )
  args = parser.parse_args()
  for size in map(int, args.sizes.split(',')):
    one, five, place = measure(
      size,
      steps=args.steps,
      num_train=args.num_train,
      num_test=args.num_test,
      noise=args.noise,
    )
    print(
      f'{size:3d} px: shape {one:.3f}, all five {five:.3f}, '
      f'place ±{place:.4f} of the image (rms), '
      f'n = {5 * args.num_test} things, noise {args.noise}',
      flush=True,
    )


if __name__ == '__main__':
  main()
