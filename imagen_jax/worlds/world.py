"""The interface of a synthetic world: scenes with captions and meanings."""

import abc
from collections.abc import Sequence

from imagen_jax.data.source import Source
from imagen_jax.worlds.captions import Meaning


class World(Source):
  """A source of rendered scenes; `scenes` gives captions without rendering."""

  has_eval_split = endless = True

  @staticmethod
  @abc.abstractmethod
  def scenes(
    seed: int, split: str, number: int, *, heldout: bool = False
  ) -> Sequence:
    """The first `number` scenes of a split, with `caption` and `meaning`.

    With `heldout`, only combinations held out of training (split 'eval').
    """

  @staticmethod
  @abc.abstractmethod
  def nouns(tokenizer, caption: str, meaning: Meaning) -> list[tuple[int, int]]:
    """Where things are named: [(position of the noun's last token, group)]."""

  def name(self, i: int) -> str:
    return f'scene {i}'
