"""What an evaluation tells while it runs."""

import sys

from imagen_jax.evaluation.scores import Categories


class Listener:
  """Shows notes only; derive from it to show more."""

  def note(self, text: str) -> None:
    """What a reader must know of the scores."""
    print(f'note: {text}', file=sys.stderr)

  def progress(self, label: str, done: int, total: int) -> None:
    """`done` of the `total` images of a run are generated; first 0."""

  def scored(self, label: str, categories: Categories) -> None:
    """A run is finished."""

  def left(self, label: str, count: int) -> None:
    """This process has finished its fraction of a run, others have not."""
