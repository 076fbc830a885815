"""The interface of a synthetic world: scenes with captions and meanings."""

import abc
import typing
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from imagen_jax.data.source import Source
from imagen_jax.errors import UsageError, check_choice
from imagen_jax.text.tokenizer import Tokenizer
from imagen_jax.worlds.captions import Meaning


class Scene(typing.Protocol):
  """What text pretraining needs of a scene; a world's scenes hold more."""

  @property
  def caption(self) -> str: ...

  @property
  def meaning(self) -> Meaning: ...


class World(Source):
  """A source of rendered scenes; `scenes` gives captions without rendering.

  Picklable and random-access: example i is a pure function of the source's
  arguments and i, so a reader may skip, shuffle and shard it freely.

  Attributes:
    size: side of the images in pixels.
    num: number of scenes.
  """

  has_eval_split = endless = True
  size: int
  num: int

  @abc.abstractmethod
  def scene(self, i: int) -> typing.Any:
    """Scene `i`, a `Scene` that `render` renders."""

  @abc.abstractmethod
  def render(self, scene: typing.Any) -> UInt8[np.ndarray, 'size size 3']:
    """The image of a scene."""

  @staticmethod
  @abc.abstractmethod
  def scenes(
    seed: int, split: str, number: int, *, heldout: bool = False
  ) -> Sequence[Scene]:
    """The first `number` scenes of a split.

    With `heldout`, only combinations held out of training (split 'eval').
    """

  @staticmethod
  @abc.abstractmethod
  def nouns(
    tokenizer: Tokenizer, caption: str, meaning: Meaning
  ) -> list[tuple[int, int]]:
    """Where things are named: [(position of the noun's last token, group)]."""

  def name(self, i: int) -> str:
    return f'scene {i}'

  def __len__(self) -> int:
    return self.num

  def __getitem__(self, i: int) -> dict[str, typing.Any]:
    if not 0 <= i < self.num:
      raise IndexError(f'scene {i} of {self.num}')
    scene = self.scene(int(i))
    return {'image': self.render(scene), 'caption': scene.caption}


def check_mixture(
  mixture: Mapping[str, float], known: typing.Collection[str]
) -> None:
  """Checks the fractions of a world's categories.

  Raises:
    UsageError: a category is unknown, a fraction is negative, or they do not
      add up to 1.
  """
  for name, fraction in mixture.items():
    check_choice(
      'a name in data.mixture', name, known, key='config.data.mixture'
    )
    if not fraction >= 0:
      raise UsageError(
        f'data.mixture.{name} is {fraction}; it must be 0 or more.',
        key='config.data.mixture',
      )
  total = sum(mixture.values())
  if abs(total - 1) > 1e-6:
    raise UsageError(
      f'The fractions of data.mixture add up to {total:g}; they must add up '
      'to 1.',
      key='config.data.mixture',
    )
