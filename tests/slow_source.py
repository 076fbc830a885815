"""A source that becomes slow on the second of several hosts."""

import itertools
import time

import jax

from imagen_jax.worlds.shapes import ShapesSource


class SlowSource(ShapesSource):
  """On process 1, an image takes a second, after the first 40 images."""

  count = itertools.count()

  def __getitem__(self, i):
    if jax.process_index() == 1 and next(self.count) >= 40:
      time.sleep(1)
    return super().__getitem__(i)
