"""How a caption of the icons world says what a scene shows."""

import random
from collections.abc import Sequence

from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import pick
from imagen_jax.worlds.icon_things import Thing, article, is_plural, plural

# Styles that are nouns: "a photo of a fox", where others are "a flat fox".
NOUNS = {'photo': ('a photo',) * 4 + ('a photograph',)}
# Before a thing; of a photo only those that are true of it.
OPENINGS = (*captions.OPENINGS[:3], 'an icon of ', *[''] * 8)
PLAIN = (captions.OPENINGS[0], captions.OPENINGS[2], *[''] * 8)


def name(rng: random.Random, thing: Thing, category: str) -> str:
  """One of a thing's names; a held-out one in the category 'synonym'."""
  if category == 'synonym':
    return pick(rng, thing.heldout)
  if thing.synonyms and rng.random() < 0.3:
    return pick(rng, thing.synonyms)
  return thing.name


def _noun(
  rng: random.Random, name: str, count: int, adjectives: Sequence[str]
) -> str:
  """'a small flat fox', 'three foxes', 'flat grapes'."""
  words = ' '.join([*adjectives, plural(name) if count > 1 else name])
  if count > 1:
    number = captions.NUMBERS[count - 1]
    return f'{number if rng.random() < 0.85 else count} {words}'
  if is_plural(name):
    return words
  return f'{article(words)} {words}'


def write(
  rng: random.Random,
  shown: Sequence[tuple[str, int]],
  style: str,
  styled: bool,
  size: str | None,
  relation: str | None,
) -> tuple[str, str]:
  """(what is shown, what comes last) in one of several ways.

  Args:
    rng: of the scene.
    shown: (name, number) of one or two groups.
    style: of the things.
    styled: whether the caption names the style.
    size: of the thing, if the caption names it.
    relation: of the first group to the second, if any.
  """
  before = styled and style not in NOUNS and rng.random() < 0.6
  sizes = [pick(rng, captions.SAID[size])] if size else []
  both = rng.random() < 0.5
  nouns = [
    _noun(rng, name, count, sizes + [style] * (before and (i == 0 or both)))
    for i, (name, count) in enumerate(shown)
  ]
  if len(nouns) == 2 and rng.random() < 0.3:  # the same from the other side
    relation = relation and captions.OPPOSITE[relation]
    nouns.reverse()
  link = pick(rng, captions.SAID[relation]) if relation else 'and'
  text = f' {link} '.join(nouns)
  if before or not styled:
    opening = OPENINGS if style not in NOUNS else PLAIN
    return pick(rng, opening) + text, ''
  if rng.random() < 0.25:
    return text, f', {style}'
  if style in NOUNS:
    return f'{pick(rng, NOUNS[style])} of {text}', ''
  a = article(style)
  way = pick(
    rng, ('{a} {s} icon of {t}', '{a} {s} image of {t}', '{t} in {s} style')
  )
  return way.format(a=a, s=style, t=text), ''


def background(rng: random.Random, colour: str | None) -> str:
  """' on a blue background' in one of several ways; '' without a colour."""
  if colour is None:
    return ''
  way = pick(
    rng,
    (' on a {} background',) * 3
    + (' on {}', ', {} background', ' against a {} background'),
  )
  said = pick(rng, captions.SAID.get(colour, (colour,)))
  return way.format(said).replace('a orange', 'an orange')
