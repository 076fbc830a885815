r"""Judges the images of an emoji cascade: do they show what their prompts say?

  python benchmarks/emoji_judge.py --write prompts.txt
  python sample.py --model runs/emoji --prompts prompts.txt --out images
  python benchmarks/emoji_judge.py images

The first command writes captions of the eval split, `--num` of each category;
'heldout' has pairs that are held out of training. The last one judges the
images. A thing is a region that differs from the background; its name is that
of the nearest glyph at 32 pixels. An image is correct if its number of things,
their names and relations and the background are as the caption says. Fractions
have Wilson's 95 % intervals. For comparison the table has the true images of
the same captions, and the generated images judged by the next caption, which is
chance level.
"""

import argparse
import itertools
import pathlib

import numpy as np
from PIL import Image
from scipy import ndimage

from imagen_jax.evaluation import scores
from imagen_jax.io.decode import resize_square
from imagen_jax.io.images import read_metadata
from imagen_jax.worlds import emoji
from imagen_jax.worlds.judge import compare
from imagen_jax.worlds.reading import Found, Reading
from imagen_jax.worlds.render import BACKGROUND

CATEGORIES = ('single', 'count', 'pair', 'relation', 'heldout')
SEED = 1  # of the world: other scenes than those of training
SIDE = 32
JOIN = 0.025  # regions up to twice this distance apart are one thing
SPECK = 0.002  # regions below this fraction of the image are ignored


def category(meaning):
  """One of `CATEGORIES`."""
  if emoji.is_held_out(meaning):
    return 'heldout'
  if len(meaning.groups) == 1:
    return 'single' if meaning.groups[0].count == 1 else 'count'
  return 'relation' if meaning.relations else 'pair'


def choose(num, names):
  """{category: [(i, scene)]}, `num` each, with distinct captions."""
  found, seen = {name: [] for name in CATEGORIES}, set()
  for i in itertools.count():
    scene = emoji.scene(SEED, 'eval', i, names)
    some = found[category(scene.meaning)]
    if len(some) < num and scene.caption not in seen:
      some.append((i, scene))
      seen.add(scene.caption)
    if all(len(some) == num for some in found.values()):
      return found


def square(image, ground):
  """Pads an image of one thing to a square and resizes it: [SIDE, SIDE, 3]."""
  side = max(image.size)
  full = Image.new('RGB', (side, side), ground)
  full.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
  return resize_square(full, SIDE).astype(np.float32)


class Reader:
  """Reads images of the glyphs of a font."""

  def __init__(self, glyphs):
    self.names = sorted(glyphs)
    self.templates = {}
    for name, ground in BACKGROUND.items():
      rows = []
      for glyph in map(glyphs.get, self.names):
        rendered = Image.new('RGB', glyph.size, ground)
        rendered.paste(glyph, (0, 0), glyph)
        # Cropped as in `read`: parts that match the background do not count.
        box = self.mask(np.asarray(rendered), np.array(ground))
        ys, xs = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        part = rendered.crop((xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))
        rows.append(square(part, ground))
      self.templates[name] = np.stack(rows)

  @staticmethod
  def mask(pixels, ground):
    """Where an image is not the background, bool [H, W]."""
    return np.abs(pixels.astype(int) - ground).max(-1) > 28

  def read(self, image):
    """A `Reading` of uint8 [H, W, 3]."""
    side = image.shape[0]
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(border, axis=0)
    background = min(
      BACKGROUND, key=lambda n: np.abs(ground - BACKGROUND[n]).sum()
    )
    mask = self.mask(image, ground)
    window = 2 * round(JOIN * side) + 1
    labels, number = ndimage.label(
      ndimage.maximum_filter(mask, window, mode='nearest')
    )
    things = []
    for k in range(1, number + 1):
      part = mask & (labels == k)
      if part.sum() < SPECK * side * side:
        continue
      ys, xs = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
      y0, y1, x0, x1 = ys[0], ys[-1] + 1, xs[0], xs[-1] + 1
      cut = np.where(part[..., None], image, ground.astype(np.uint8))
      crop = square(
        Image.fromarray(cut[y0:y1, x0:x1]), tuple(ground.astype(int))
      )
      away = np.abs(self.templates[background] - crop).mean((1, 2, 3))
      things.append(
        Found(
          shape=self.names[int(np.argmin(away))],
          colour=None,
          fill=None,
          size=None,
          x=(x0 + x1) / 2 / side,
          y=(y0 + y1) / 2 / side,
          width=(x1 - x0) / side,
          height=(y1 - y0) / side,
          match=float(1 - away.min() / 255),
        )
      )
    return Reading(background, tuple(things))

  def correct(self, image, meaning):
    """Whether an image shows a meaning."""
    reading = self.read(image)
    return len(reading.things) <= 6 and compare(reading, meaning).correct


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('images', nargs='?', type=pathlib.Path)
  parser.add_argument('--write', type=pathlib.Path, help='file for the prompts')
  parser.add_argument('--num', type=int, default=80)
  parser.add_argument('--font', help='where it is not found')
  args = parser.parse_args()
  if not (args.write or args.images):
    parser.error('give a folder of images, or --write a file of prompts.')
  source = emoji.EmojiSource(args.font, 256, seed=SEED, split='eval')
  found = choose(args.num, source.names)
  if args.write:
    lines = [scene.caption for some in found.values() for _, scene in some]
    args.write.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return
  reader = Reader(source.glyphs)
  generated = {}
  for file in sorted(args.images.glob('[0-9]*.png')):
    generated[read_metadata(file)['prompt']] = np.asarray(
      Image.open(file).convert('RGB')
    )
  print('| category | generated images | true images | another caption | n |')
  print('|---|---|---|---|---|')
  for name, some in found.items():
    some = [(i, s) for i, s in some if s.caption in generated]
    if not some:
      continue
    images = [generated[s.caption] for _, s in some]
    meanings = [s.meaning for _, s in some]
    others = meanings[1:] + meanings[:1]
    cells = (
      scores.cell(map(reader.correct, images, meanings)),
      scores.cell(
        reader.correct(source[i]['image'], s.meaning) for i, s in some
      ),
      scores.cell(map(reader.correct, images, others)),
    )
    print(f'| {name} |', ' | '.join(cells), f'| {len(some)} |')


if __name__ == '__main__':
  main()
