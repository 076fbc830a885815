"""The emoji world: captioned scenes composed of emoji glyphs.

The glyphs come from a colour font installed on the system (Noto Color Emoji),
which is not part of this package. As in the shapes world, example i of a split
is a pure function of (seed, split, i), for instance "two dogs to the left of a
red car", and some pairs of things are held out of training.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import random
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imagen_jax.io.decode import resize_square
from imagen_jax.text.tokenizer import Tokenizer
from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import Group, Meaning, pick
from imagen_jax.worlds.glyphs import THINGS, find_font, load_glyphs
from imagen_jax.worlds.layout import place
from imagen_jax.worlds.render import BACKGROUND
from imagen_jax.worlds.world import World

PLURALS = {
  'sheep': 'sheep',
  'mouse': 'mice',
  'fish': 'fish',
  'strawberry': 'strawberries',
}
HELD_OUT = 0.1  # fraction of the pairs held out of training
LARGEST = (0.7, 0.44, 0.38, 0.36, 0.31)  # diameter, by the number of things


def plural(name: str) -> str:
  """'dog' -> 'dogs', 'bus' -> 'buses', 'sheep' -> 'sheep'."""
  return PLURALS.get(name) or captions.plural(name)


def held_out(a: str, b: str) -> bool:
  """Whether a pair of things, in either order, is held out of training."""
  pair = '/'.join(sorted((a, b)))
  return random.Random(f'held out: {pair}').random() < HELD_OUT


def is_held_out(meaning: Meaning) -> bool:
  """Whether a scene shows a pair that is held out of training."""
  names = [group.shape for group in meaning.groups]
  return len(names) == 2 and held_out(*names)


@dataclasses.dataclass(frozen=True)
class Scene:
  """A scene to render and its caption.

  `things` are (name, x, y, diameter), in fractions of the image. In `meaning`
  a group's shape is the thing's name.
  """

  caption: str
  background: str
  things: tuple[tuple[str, float, float, float], ...]
  meaning: Meaning


def _groups(
  rng: random.Random, split: str, names: Sequence[str]
) -> tuple[list[Group], str | None]:
  """One or two groups, and the relation of the first to the second, if any."""
  first = pick(rng, names)
  kind = rng.random()
  if kind < 0.35 or len(names) == 1:
    return [Group(first, None, 1 + int(rng.random() * 5))], None
  others = [
    name
    for name in names
    if name != first and (split == 'eval' or not held_out(first, name))
  ]
  if not others:
    return [Group(first, None)], None
  second = pick(rng, others)
  count = 2 if rng.random() < 0.3 else 1
  relation = pick(rng, captions.RELATIONS) if kind < 0.75 else None
  return [Group(first, None, count), Group(second, None)], relation


def _write(
  rng: random.Random, groups: Sequence[Group], relation: str | None
) -> str:
  """The caption, without the background: 'two dogs below an elephant'."""
  nouns = [
    f'{captions.NUMBERS[g.count - 1]} {plural(g.shape)}'
    if g.count > 1
    else f'{captions.article_of(g.shape)} {g.shape}'
    for g in groups
  ]
  if not relation:
    return ' and '.join(nouns)
  # The same scene can be described from either side.
  if rng.random() < 0.3:
    nouns, relation = nouns[::-1], captions.OPPOSITE[relation]
  return f' {pick(rng, captions.SAID[relation])} '.join(nouns)


def scene(
  seed: int, split: str, i: int, names: Sequence[str] | None = None
) -> Scene:
  """Scene `i` of a split.

  Args:
    seed: any int.
    split: 'train' or 'eval'; they share no random stream, and only 'eval' has
      pairs that are held out.
    i: any int ≥ 0.
    names: the things to choose from; None: all of `THINGS`.

  Returns:
    a `Scene`.
  """
  rng = random.Random(f'emoji/{seed}/{split}/{i}')
  background = pick(rng, tuple(BACKGROUND))
  groups, relation = _groups(rng, split, names or sorted(THINGS))
  kinds = [group.shape for group in groups for _ in range(group.count)]
  largest = LARGEST[len(kinds) - 1]
  sizes = [largest * (0.8 + 0.2 * rng.random()) for _ in kinds]
  # The relation holds between each thing of the first group and the second.
  last = len(kinds) - 1
  between = [(k, relation, last) for k in range(last)] if relation else []
  sizes, places = place(rng, sizes, [0.2] * len(kinds), between)
  caption = _write(rng, groups, relation)
  named = rng.random() < 0.25
  if named:
    caption += f' on a {background} background'
  return Scene(
    caption,
    background,
    tuple((n, x, y, d) for n, (x, y), d in zip(kinds, places, sizes)),
    Meaning(
      tuple(groups),
      ((0, relation, 1),) if relation else (),
      background if named else None,
    ),
  )


def nouns(
  tokenizer: Tokenizer, caption: str, meaning: Meaning
) -> list[tuple[int, int]]:
  """Where things are named: [(position of the name's last token, group)].

  Each word belongs to one name at most: 'palm tree' does not also name a
  'tree'.
  """
  names = {
    tuple(name.split()): group
    for group, g in enumerate(meaning.groups)
    for name in (g.shape, plural(g.shape))
  }
  words = caption.lower().split()
  found, position, k = [], 0, 0
  while k < len(words):
    name = next((n for n in names if tuple(words[k : k + len(n)]) == n), ())
    step = max(1, len(name))
    position += sum(len(tokenizer.pieces(w)) for w in words[k : k + step])
    if name:
      found.append((position - 1, names[name]))
    k += step
  return found


class EmojiSource(World):
  """Random-access source of {'image', 'caption'}, for `data.pipeline`.

  Args:
    path: of the font; None: see `find_font`.
    size: side of the images in pixels.
    seed: of the world.
    split: 'train' or 'eval'.
    num: number of scenes.

  Attributes:
    glyphs: {name: RGBA image} of the things that the font can render.
    names: their names, in a fixed order.

  Raises:
    DataError: there is no font, or it has fewer than two of the things.
  """

  nouns = staticmethod(nouns)

  def __init__(
    self,
    path: str | os.PathLike[str] | None,
    size: int,
    *,
    seed: int = 0,
    split: str = 'train',
    num: int = 1_000_000,
  ) -> None:
    self.path = find_font(path)
    self.size, self.seed, self.split, self.num = size, seed, split, num
    self.glyphs = load_glyphs(self.path)
    self.names = tuple(sorted(self.glyphs))

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the font file: another font renders another data set."""
    return hashlib.sha256(self.path.read_bytes()).hexdigest()

  def scene(self, i: int) -> Scene:
    return scene(self.seed, self.split, i, self.names)

  def render(self, scene: Scene) -> UInt8[np.ndarray, 'size size 3']:
    # Supersampled, then averaged: edges and positions are subpixel-exact.
    side = max(1, 256 // self.size) * self.size
    image = Image.new('RGB', (side, side), BACKGROUND[scene.background])
    for name, x, y, diameter in scene.things:
      thing = self.glyphs[name]
      factor = diameter * side / max(thing.size)
      width, height = (max(1, round(factor * n)) for n in thing.size)
      thing = thing.resize((width, height), Image.Resampling.LANCZOS)
      corner = round(x * side - width / 2), round(y * side - height / 2)
      image.paste(thing, corner, thing)
    return resize_square(image, self.size)

  @staticmethod
  def scenes(
    seed: int, split: str, number: int, *, heldout: bool = False
  ) -> list[Scene]:
    found = (scene(seed, split, i) for i in itertools.count())
    wanted = (s for s in found if is_held_out(s.meaning) or not heldout)
    return list(itertools.islice(wanted, number))
