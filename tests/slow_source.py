"""A source that becomes slow on the second of several hosts."""

import os
import pathlib
import time

import jax

from imagen_jax.worlds.shapes import ShapesSource


class SlowSource(ShapesSource):
  """On process 1, an image takes a second once the file `SLOW_AFTER` exists."""

  def __getitem__(self, i):
    slow = jax.process_index() == 1
    if slow and pathlib.Path(os.environ['SLOW_AFTER']).exists():
      time.sleep(1)
    return super().__getitem__(i)
