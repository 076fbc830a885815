"""What a synthetic world gives besides images: scenes and their meaning."""

import abc
from collections.abc import Sequence

from imagen_jax.data.source import Source
from imagen_jax.worlds.captions import Meaning


class World(Source):
  """A source that renders scenes; captions can be had without rendering."""

  has_eval_split = endless = True

  @staticmethod
  @abc.abstractmethod
  def scenes(
    seed: int, split: str, number: int, *, heldout: bool = False
  ) -> Sequence:
    """The first `number` scenes of a split, with `caption` and `meaning`.

    Args:
      seed, split: of the world.
      number: how many.
      heldout: of 'eval', only combinations that are never trained.
    """

  @staticmethod
  @abc.abstractmethod
  def nouns(tokenizer, caption: str, meaning: Meaning) -> list[tuple[int, int]]:
    """Where things are named: [(position of the noun's last token, group)]."""

  def name(self, i: int) -> str:
    return f'scene {i}'
