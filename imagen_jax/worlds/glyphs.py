"""The emoji of a colour font that is installed on the system."""

import os
import pathlib
import unicodedata

from PIL import Image, ImageDraw, ImageFont

from imagen_jax.errors import DataError

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
NAMES = (
  'dog, cat, horse, cow, pig, sheep, elephant, camel, tiger, rabbit, mouse, '
  'rooster, penguin, turtle, snake, snail, bee, ladybug, fish, octopus, whale, '
  'red car, blue car, bus, truck, tractor, bicycle, helicopter, rocket, ship, '
  'house, tree, palm tree, cactus, sunflower, rose, mushroom, red apple, '
  'green apple, banana, strawberry, pineapple, lemon, hamburger, '
  'birthday cake, balloon, key, guitar, trumpet, soccer ball, alarm clock, '
  'light bulb, crown, top hat, robot, ghost'
).split(', ')
# Unicode's names where they differ.
UNICODE = {
  'camel': 'bactrian camel',
  'bee': 'honeybee',
  'ladybug': 'lady beetle',
  'whale': 'spouting whale',
  'red car': 'automobile',
  'blue car': 'recreational vehicle',
  'truck': 'delivery truck',
  'house': 'house building',
  'tree': 'deciduous tree',
  'light bulb': 'electric light bulb',
  'robot': 'robot face',
}
THINGS = {name: unicodedata.lookup(UNICODE.get(name, name)) for name in NAMES}


def find_font(path: str | os.PathLike[str] | None = None) -> pathlib.Path:
  """The path given, or Noto Color Emoji in the usual font folders.

  Raises:
    DataError: no path was given and no such font is installed.
  """
  if path:
    return pathlib.Path(path)
  for folder in map(pathlib.Path, map(os.path.expanduser, PLACES)):
    for name in FONTS:
      if found := sorted(folder.rglob(name)):
        return found[0]
  raise DataError(
    'no Noto Color Emoji font was found on this system: install it (package '
    'fonts-noto-color-emoji on Debian and Ubuntu) or set data.path to the file.'
  )


def load_font(path: str | os.PathLike[str]) -> ImageFont.FreeTypeFont:
  """The font in the first of `SIZES` that it provides.

  Raises:
    DataError: the file is not a usable font.
  """
  for size in SIZES:
    try:
      return ImageFont.truetype(str(path), size)
    except OSError as error:
      problem = error
  raise DataError(
    f'{path} cannot be used as a font ({problem}); set data.path to a colour '
    'emoji font.'
  )


def render(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
  """A character as a tightly cropped RGBA image; None: nothing is rendered."""
  side = 2 * int(font.size)
  image = Image.new('RGBA', (side, side), (0, 0, 0, 0))
  ImageDraw.Draw(image).text(
    (side // 4, side // 4), text, font=font, embedded_color=True
  )
  box = image.getbbox()
  return None if box is None else image.crop(box)


def load_glyphs(path: str | os.PathLike[str]) -> dict[str, Image.Image]:
  """{name: RGBA image} of the `THINGS` that a font can render.

  Raises:
    DataError: the file is not a font with two of the things or more.
  """
  font = load_font(path)
  missing = render(font, '\U0010fffe')
  found = {}
  for name, text in THINGS.items():
    glyph = render(font, text)
    if glyph and not (missing and glyph.tobytes() == missing.tobytes()):
      found[name] = glyph
  if len(found) < 2:
    raise DataError(
      f'{path} renders {len(found)} of the {len(THINGS)} things; set data.path '
      'to a colour emoji font.'
    )
  return found
