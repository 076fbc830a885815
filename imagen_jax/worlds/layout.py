"""Sizes and positions of the things in a scene.

Things are as large as the scene permits, because the base model has few pixels.
Their boxes keep a gap and a stated relation holds by a clear margin, so the
judge meets no borderline cases.
"""

import random
from collections.abc import Iterable, Sequence

from imagen_jax.worlds.captions import Group

BORDER = 0.03  # free margin of the image, as a fraction of its side
GAP = 0.06  # least distance between the boxes of two things
# Diameters that a size word stands for; between the two, no word is used.
SMALL, LARGE = (0.24, 0.3), (0.4, 0.62)
LEAST = 0.24  # diameter below which nothing shrinks to make room


def uniform(rng: random.Random, low: float, high: float) -> float:
  """A uniform sample from [low, high)."""
  return low + (high - low) * rng.random()


def diameter(
  rng: random.Random, group: Group, number: int, vary: bool
) -> float:
  """A diameter for a group in a scene of `number` things, as large as fits."""
  if group.size == 'small':
    return uniform(rng, *SMALL)
  if group.size == 'large':
    return uniform(rng, LARGE[0], LARGE[1] if number == 1 else 0.42)
  if number == 1:
    # Without a size word a thing may have either size; most are large.
    small = vary and rng.random() < 0.2
    return uniform(rng, *(SMALL if small else (0.44, 0.66)))
  largest = {2: 0.42, 3: 0.37, 4: 0.36, 5: 0.31}[number]
  return uniform(rng, 0.85 * largest, largest)


def _related(word: str, dx: float, dy: float) -> bool:
  """Whether an offset (a minus b) is `word` by a clear margin."""
  along, across = (dx, dy) if word in ('left of', 'right of') else (dy, dx)
  if word in ('left of', 'above'):
    along = -along
  return along > 0 and abs(across) < 0.4 * along


def place(
  rng: random.Random,
  diameters: Iterable[float],
  least: Sequence[float],
  relations: Iterable[tuple[int, str, int]],
) -> tuple[list[float], list[tuple[float, float]]]:
  """Centres of boxes that keep `GAP` and satisfy the relations.

  Positions are rejection-sampled. After every 20 failures all diameters shrink
  by 3 %, but none below its own in `least`.

  Returns:
    (diameters, [(x, y), ...]).
  """
  diameters, failures = list(diameters), 0
  while True:
    places: list[tuple[float, float]] = []
    for i, d in enumerate(diameters):
      low, high = BORDER + d / 2, 1 - BORDER - d / 2
      for _ in range(12):
        x, y = uniform(rng, low, high), uniform(rng, low, high)
        if all(
          max(abs(x - px), abs(y - py)) >= (d + e) / 2 + GAP
          for (px, py), e in zip(places, diameters)
        ) and all(
          _related(word, places[a][0] - x, places[a][1] - y)
          for a, word, b in relations
          if b == i
        ):
          places.append((x, y))
          break
      else:
        break
    if len(places) == len(diameters):
      return diameters, places
    failures += 1
    if failures % 20 == 0:
      diameters = [max(0.97 * d, m) for d, m in zip(diameters, least)]
