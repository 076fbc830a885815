"""Callbacks of a running evaluation."""

import sys

from imagen_jax.evaluation.scores import Categories


class Listener:
  """Prints notes only; derive from it to show more."""

  def note(self, text: str) -> None:
    """Called with a caveat on the scores."""
    print(f'note: {text}', file=sys.stderr)

  def progress(self, label: str, done: int, total: int) -> None:
    """Called after `done` of this process's `total` images; first with 0."""

  def scored(self, label: str, categories: Categories) -> None:
    """Called when a run is finished."""

  def left(self, label: str, count: int) -> None:
    """Called when a run still lacks `count` images of other processes."""
