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
import pathlib
import random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imagen_jax.errors import DataError
from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import (
  NUMBERS,
  OPPOSITE,
  RELATIONS,
  SAID,
  Group,
  Meaning,
  pick,
)
from imagen_jax.worlds.layout import place
from imagen_jax.worlds.render import BACKGROUND
from imagen_jax.worlds.world import World

FONTS = ('NotoColorEmoji.ttf', 'Noto-COLRv1.ttf', 'NotoColorEmoji-Regular.ttf')
PLACES = (
  '~/.fonts',
  '~/.local/share/fonts',
  '/usr/local/share/fonts',
  '/usr/share/fonts',
  '~/Library/Fonts',
  '/Library/Fonts',
)
# A bitmap font has one size only (Noto: 109); a vector font takes the first.
SIZES = (109, 136, 128, 160, 96, 64)
# Everyday names. Colours are those of Noto's glyphs.
THINGS = {
  'dog': '\N{DOG}',
  'cat': '\N{CAT}',
  'horse': '\N{HORSE}',
  'cow': '\N{COW}',
  'pig': '\N{PIG}',
  'sheep': '\N{SHEEP}',
  'elephant': '\N{ELEPHANT}',
  'camel': '\N{BACTRIAN CAMEL}',
  'tiger': '\N{TIGER}',
  'rabbit': '\N{RABBIT}',
  'mouse': '\N{MOUSE}',
  'rooster': '\N{ROOSTER}',
  'penguin': '\N{PENGUIN}',
  'turtle': '\N{TURTLE}',
  'snake': '\N{SNAKE}',
  'snail': '\N{SNAIL}',
  'bee': '\N{HONEYBEE}',
  'ladybug': '\N{LADY BEETLE}',
  'fish': '\N{FISH}',
  'octopus': '\N{OCTOPUS}',
  'whale': '\N{SPOUTING WHALE}',
  'red car': '\N{AUTOMOBILE}',
  'blue car': '\N{RECREATIONAL VEHICLE}',
  'bus': '\N{BUS}',
  'truck': '\N{DELIVERY TRUCK}',
  'tractor': '\N{TRACTOR}',
  'bicycle': '\N{BICYCLE}',
  'helicopter': '\N{HELICOPTER}',
  'rocket': '\N{ROCKET}',
  'ship': '\N{SHIP}',
  'house': '\N{HOUSE BUILDING}',
  'tree': '\N{DECIDUOUS TREE}',
  'palm tree': '\N{PALM TREE}',
  'cactus': '\N{CACTUS}',
  'sunflower': '\N{SUNFLOWER}',
  'rose': '\N{ROSE}',
  'mushroom': '\N{MUSHROOM}',
  'red apple': '\N{RED APPLE}',
  'green apple': '\N{GREEN APPLE}',
  'banana': '\N{BANANA}',
  'strawberry': '\N{STRAWBERRY}',
  'pineapple': '\N{PINEAPPLE}',
  'lemon': '\N{LEMON}',
  'hamburger': '\N{HAMBURGER}',
  'birthday cake': '\N{BIRTHDAY CAKE}',
  'balloon': '\N{BALLOON}',
  'key': '\N{KEY}',
  'guitar': '\N{GUITAR}',
  'trumpet': '\N{TRUMPET}',
  'soccer ball': '\N{SOCCER BALL}',
  'alarm clock': '\N{ALARM CLOCK}',
  'light bulb': '\N{ELECTRIC LIGHT BULB}',
  'crown': '\N{CROWN}',
  'top hat': '\N{TOP HAT}',
  'robot': '\N{ROBOT FACE}',
  'ghost': '\N{GHOST}',
}
PLURALS = {
  'sheep': 'sheep',
  'mouse': 'mice',
  'fish': 'fish',
  'strawberry': 'strawberries',
}
HELD_OUT = 0.1  # fraction of the pairs held out of training


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


def said(rng: random.Random, name: str, count: int) -> str:
  """'a dog', 'an elephant', 'two dogs'."""
  if count > 1:
    return f'{NUMBERS[count - 1]} {plural(name)}'
  return f'{"an" if name[0] in "aeiou" else "a"} {name}'


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


def scene(
  seed: int, split: str, i: int, names: tuple[str, ...] | None = None
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
  names = names or tuple(sorted(THINGS))
  rng = random.Random(f'emoji/{seed}/{split}/{i}')
  background = pick(rng, tuple(BACKGROUND))
  groups = [(pick(rng, names), 1)]
  relation = None
  kind = rng.random()
  if kind < 0.35 or len(names) == 1:
    groups = [(groups[0][0], 1 + int(rng.random() * 5))]
  else:
    first = groups[0][0]
    others = [
      name
      for name in names
      if name != first and (split == 'eval' or not held_out(first, name))
    ]
    if others:
      groups.append((pick(rng, tuple(others)), 1))
      if rng.random() < 0.3:
        groups[0] = (first, 2)
      if kind < 0.75:
        relation = pick(rng, RELATIONS)
  number = sum(count for _, count in groups)
  largest = {1: 0.7, 2: 0.44, 3: 0.38, 4: 0.36, 5: 0.31}[number]
  sizes = [largest * (0.8 + 0.2 * rng.random()) for _ in range(number)]
  # The relation holds between each thing of the first group and the second.
  last = number - 1
  sizes, places = place(
    rng,
    sizes,
    [0.2] * number,
    tuple((k, relation, last) for k in range(last)) if relation else (),
  )
  kinds = [name for name, count in groups for _ in range(count)]
  words = [said(rng, name, count) for name, count in groups]
  meant = ((0, relation, 1),) if relation else ()
  if relation:
    # The same scene can be described from either side.
    if rng.random() < 0.3:
      words, relation = words[::-1], OPPOSITE[relation]
    caption = f' {pick(rng, SAID[relation])} '.join(words)
  else:
    caption = ' and '.join(words)
  named = rng.random() < 0.25
  if named:
    caption += f' on a {background} background'
  return Scene(
    caption,
    background,
    tuple((n, x, y, d) for n, (x, y), d in zip(kinds, places, sizes)),
    Meaning(
      tuple(Group(name, None, count) for name, count in groups),
      meant,
      background if named else None,
    ),
  )


def nouns(
  tokenizer: Any, caption: str, meaning: Meaning
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


def find_font(path: str | os.PathLike | None = None) -> pathlib.Path:
  """The path given, or Noto Color Emoji in the usual font folders.

  Raises:
    DataError: no path was given and no such font is installed.
  """
  if path:
    return pathlib.Path(path)
  for folder in (pathlib.Path(p).expanduser() for p in PLACES):
    for name in FONTS:
      found = sorted(folder.rglob(name)) if folder.is_dir() else ()
      if found:
        return found[0]
  raise DataError(
    'no Noto Color Emoji font was found on this system: install it (package '
    'fonts-noto-color-emoji on Debian and Ubuntu) or set data.path to the file.'
  )


def load_font(path: str | os.PathLike) -> ImageFont.FreeTypeFont:
  """The font in the first of `SIZES` that it provides.

  Raises:
    DataError: the file is not a usable font.
  """
  error = None
  for size in SIZES:
    try:
      return ImageFont.truetype(str(path), size)
    except OSError as failed:
      error = failed
  raise DataError(f'{path} cannot be used as a font ({error}).')


def glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
  """A character as a tightly cropped RGBA image; None: nothing is rendered."""
  side = 2 * int(font.size)
  image = Image.new('RGBA', (side, side), (0, 0, 0, 0))
  ImageDraw.Draw(image).text(
    (side // 4, side // 4), text, font=font, embedded_color=True
  )
  box = image.getbbox()
  return None if box is None else image.crop(box)


class EmojiSource(World):
  """Random-access source of {'image', 'caption'}, for `data.pipeline`.

  Args:
    path: of the font; None: see `find_font`.
    size: side of the images in pixels.
    seed: of the world.
    split: 'train' or 'eval'.
    num: number of scenes.

  Raises:
    DataError: there is no font, or it has fewer than two of the things.
  """

  nouns = staticmethod(nouns)

  def __init__(
    self,
    path: str | os.PathLike | None,
    size: int,
    *,
    seed: int = 0,
    split: str = 'train',
    num: int = 1_000_000,
  ) -> None:
    self.path = find_font(path)
    self.size, self.seed, self.split, self.num = size, seed, split, num
    if len(self.names) < 2:
      raise DataError(
        f'{self.path} renders {len(self.names)} of the {len(THINGS)} things; '
        'give a colour emoji font.'
      )

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the font file: another font renders another data set."""
    return hashlib.sha256(self.path.read_bytes()).hexdigest()

  @functools.cached_property
  def glyphs(self) -> dict[str, Image.Image]:
    """{name: RGBA image} of the things that the font can render."""
    font = load_font(self.path)
    missing = glyph(font, '\U0010fffe')
    found = {name: glyph(font, text) for name, text in THINGS.items()}
    return {
      name: image
      for name, image in found.items()
      if image is not None
      and (missing is None or image.tobytes() != missing.tobytes())
    }

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the things that the font can render, in a fixed order."""
    return tuple(sorted(self.glyphs))

  def __len__(self) -> int:
    return self.num

  def __getitem__(self, i: int) -> dict[str, Any]:
    """{'image': uint8 [size, size, 3], 'caption': str}."""
    i = int(i)
    if not 0 <= i < self.num:
      raise IndexError(f'scene {i} of {self.num}')
    rendered = scene(self.seed, self.split, i, self.names)
    # Supersampled, then box-averaged: edges and positions are subpixel-exact.
    scale = max(1, 256 // self.size)
    side = scale * self.size
    image = Image.new('RGB', (side, side), BACKGROUND[rendered.background])
    for name, x, y, diameter in rendered.things:
      thing = self.glyphs[name]
      factor = diameter * side / max(thing.size)
      width, height = (max(1, round(factor * n)) for n in thing.size)
      thing = thing.resize((width, height), Image.Resampling.LANCZOS)
      corner = round(x * side - width / 2), round(y * side - height / 2)
      image.paste(thing, corner, thing)
    image = image.resize((self.size, self.size), Image.Resampling.BOX)
    return {'image': np.asarray(image), 'caption': rendered.caption}

  @staticmethod
  def scenes(seed, split, number, *, heldout=False):
    found = (scene(seed, split, i) for i in itertools.count())
    if heldout:
      found = (s for s in found if is_held_out(s.meaning))
    return list(itertools.islice(found, number))
