"""How often the judge itself is right, on pictures known to be right.

  python -m imagen_jax.evaluation.judge_accuracy [--num 500] [--sizes 64,256]

prints, for every size and category, the share of renders that the judge finds
right: clean; after a mild blur and noise; and with the captions shuffled,
where it should be nearly none.
"""

import argparse
import time

import numpy as np

from imagen_jax.data.shapes import CATEGORIES, render, scene
from imagen_jax.evaluation.judge import judge

BLUR, NOISE = 1 / 128, 0.04  # of the picture's side; of the range of a pixel


def degrade(image, rng, *, blur=BLUR, noise=NOISE):
  """A Gaussian blur of sigma `blur`·size, then pixel noise, uint8 to uint8."""
  sigma = blur * image.shape[0]
  reach = int(4 * sigma) + 1
  kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
  kernel /= kernel.sum()
  x = image.astype(np.float32)
  for axis in (0, 1):
    edge = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
    p = np.moveaxis(np.pad(x, edge, mode='edge'), axis, 0)
    n = image.shape[axis]
    x = sum(k * p[i : i + n] for i, k in enumerate(kernel))
    x = np.moveaxis(x, 0, axis)
  x = x + 255 * noise * rng.standard_normal(x.shape)
  return np.rint(np.clip(x, 0, 255)).astype(np.uint8)


def accuracy(seed, num, size, *, degraded=False, shuffled=False):
  """{category: share judged right} over `num` renders of each category.

  Args:
    seed: of the scenes and of the noise.
    num: scenes per category.
    size: of the pictures, in pixels.
    degraded: blur the pictures and add noise first.
    shuffled: judge each picture by the caption of the next scene.
  """
  rng = np.random.default_rng(seed)
  result = {}
  for category in CATEGORIES:
    scenes = [scene(seed, 'eval', i, category=category) for i in range(num)]
    right = 0
    for i, s in enumerate(scenes):
      image = render(s, size)
      if degraded:
        image = degrade(image, rng)
      meaning = scenes[(i + 1) % num].meaning if shuffled else s.meaning
      right += judge(image, meaning).correct
    result[category] = right / num
  return result


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num', type=int, default=500)
  parser.add_argument('--sizes', default='32,64,128,256,512')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  print(f'{"":>14}' + ''.join(f'{c:>10}' for c in CATEGORIES))
  for size in map(int, args.sizes.split(',')):
    for name, how in (
      ('clean', {}),
      ('degraded', {'degraded': True}),
      ('shuffled', {'shuffled': True}),
    ):
      row = accuracy(args.seed, args.num, size, **how)
      print(
        f'{size:>5}{name:>9}' + ''.join(f'{v:>10.3f}' for v in row.values()),
        flush=True,
      )
  image = render(scene(args.seed, 'eval', 0, category='pair'), 256)
  start = time.perf_counter()
  for _ in range(20):
    judge(image, scene(args.seed, 'eval', 0, category='pair').meaning)
  print(f'{(time.perf_counter() - start) / 20 * 1e3:.0f} ms a 256 px picture')


if __name__ == '__main__':
  main()
