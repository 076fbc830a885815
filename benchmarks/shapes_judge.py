"""How often the judge is correct on images that are known to be correct.

  python benchmarks/shapes_judge.py [--num 500] [--sizes 64,256]

prints, for every size and category, the fraction of renders that the judge
finds correct. It should be near 1 for clean renders and after mild blur and
noise (`degrade`), near 0 with captions shuffled or with one word of the
meaning changed (`spoil`).
"""

import argparse
import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage

from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import Meaning
from imagen_jax.worlds.judge import judge
from imagen_jax.worlds.reading import FILL_SIZE
from imagen_jax.worlds.shapes import CATEGORIES, render, scene

T = TypeVar('T')
BLUR, NOISE = 1 / 128, 0.04  # of the image's side; of the range of a pixel


def degrade(
  image: UInt8[np.ndarray, 'h w 3'],
  rng: np.random.Generator,
  *,
  blur: float = BLUR,
  noise: float = NOISE,
) -> UInt8[np.ndarray, 'h w 3']:
  """Gaussian blur (sigma `blur`·height), then noise (sigma 255·`noise`)."""
  sigma = blur * image.shape[0]
  x = ndimage.gaussian_filter(
    image.astype(np.float32),
    sigma,
    axes=(0, 1),
    mode='nearest',
    radius=int(4 * sigma) + 1,
  )
  noisy = x + 255 * noise * rng.standard_normal(x.shape)
  return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)


def _with(items: Sequence[T], i: int, new: T) -> tuple[T, ...]:
  """The items with the i-th replaced."""
  return *items[:i], new, *items[i + 1 :]


def spoil(
  meaning: Meaning, rng: random.Random, *, fills: bool = True
) -> Meaning:
  """The meaning with one word made false: the hardest wrong caption.

  Args:
    meaning: true of some image.
    rng: chooses the word and its replacement.
    fills: whether a fill may be changed.
  """

  def other(word: str | None, words: Sequence[str]) -> str:
    return captions.pick(rng, [w for w in words if w != word])

  wrong: list[dict[str, Any]] = []
  for i, group in enumerate(meaning.groups):
    changes: dict[str, Any] = {
      'shape': other(group.shape, captions.SHAPES),
      'colour': other(group.colour, captions.COLOURS),
      'count': group.count + (1 if group.count == 1 else -1),
    }
    if group.size:
      changes['size'] = other(group.size, captions.SIZES)
    if group.fill and fills:
      changes['fill'] = other(group.fill, captions.FILLS)
    for field, value in changes.items():
      changed = dataclasses.replace(group, **{field: value})
      wrong.append({'groups': _with(meaning.groups, i, changed)})
  for i, (a, word, b) in enumerate(meaning.relations):
    opposite = a, captions.OPPOSITE[word], b
    wrong.append({'relations': _with(meaning.relations, i, opposite)})
  if meaning.background:
    word = other(meaning.background, captions.BACKGROUNDS)
    wrong.append({'background': word})
  return dataclasses.replace(meaning, **captions.pick(rng, wrong))


def accuracy(
  seed: int, num: int, size: int, *, how: str = 'clean'
) -> dict[str, float]:
  """{category: fraction judged correct} over `num` renders of each category.

  Args:
    seed: of the scenes and of the noise.
    num: scenes per category.
    size: of the images, in pixels.
    how: 'clean'; 'degraded', with blur and noise; 'shuffled', judged by the
      caption of the next scene; 'spoiled', judged by a caption with one word
      changed.
  """
  noise, words = np.random.default_rng(seed), random.Random(seed)
  result = {}
  for category in CATEGORIES:
    scenes = [scene(seed, 'eval', i, category=category) for i in range(num)]
    correct = 0
    for i, s in enumerate(scenes):
      image, meaning = render(s, size), s.meaning
      if how == 'degraded':
        image = degrade(image, noise)
      elif how == 'shuffled':
        meaning = scenes[(i + 1) % num].meaning
      elif how == 'spoiled':
        meaning = spoil(meaning, words, fills=size >= FILL_SIZE)
      correct += judge(image, meaning).correct
    result[category] = correct / num
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num', type=int, default=500)
  parser.add_argument('--sizes', default='32,64,128,256,512')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  print(f'{"":>14}' + ''.join(f'{c:>10}' for c in CATEGORIES))
  for size in map(int, args.sizes.split(',')):
    for how in ('clean', 'degraded', 'shuffled', 'spoiled'):
      row = accuracy(args.seed, args.num, size, how=how)
      cells = ''.join(f'{v:>10.3f}' for v in row.values())
      print(f'{size:>5}{how:>9}{cells}', flush=True)
  scenes = [scene(args.seed, 'eval', i, category='count') for i in range(20)]
  images = [render(s, 256) for s in scenes]
  start = time.perf_counter()
  for s, image in zip(scenes, images):
    judge(image, s.meaning)
  print(f'{(time.perf_counter() - start) / 20 * 1e3:.0f} ms a 256 px image')


if __name__ == '__main__':
  main()
