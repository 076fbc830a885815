"""What the icons world can show: things, their names, what is held out."""

import dataclasses
import functools
import importlib.resources
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from imagen_jax.errors import UsageError
from imagen_jax.worlds import emoji
from imagen_jax.worlds.icon_sets import IconSet

FEWEST = 4  # things that a style must show
HELD_STYLE = 0.2  # fraction of the things of which one style is held out
IRREGULAR = {
  'sheep': 'sheep',
  'deer': 'deer',
  'moose': 'moose',
  'squid': 'squid',
  'fish': 'fish',
  'mouse': 'mice',
  'wolf': 'wolves',
  'leaf': 'leaves',
  'loaf': 'loaves',
  'knife': 'knives',
  'tooth': 'teeth',
  'die': 'dice',
  'snowman': 'snowmen',
  'goose': 'geese',
  'ox': 'oxen',
}
LINK = re.compile(' (of|with|in|at|over|on|showing) ')
# Of these there is "a", or a number, of a portion only.
MASS = frozenset(
  'bacon bowling broccoli cattle cheddar cheese coral cutlery dna fire garlic '
  'lightning luggage maize noodles pasta popcorn skis spaghetti sushi '
  'swine'.split()
)


@dataclasses.dataclass(frozen=True)
class Thing:
  """A thing that scenes show.

  Attributes:
    name: its everyday name.
    code: its code points.
    synonyms: other names, which training captions have too.
    heldout: other names, which no training caption has.
  """

  name: str
  code: str
  synonyms: tuple[str, ...] = ()
  heldout: tuple[str, ...] = ()


@functools.cache
def listed() -> dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]:
  """{Unicode's short name: (everyday name, synonyms, held-out synonyms)}."""
  path = importlib.resources.files('imagen_jax.worlds') / 'icons.txt'
  found = {}
  for line in path.read_text(encoding='utf-8').splitlines():
    if line and not line.startswith('#'):
      short, _, said = line.partition('=')
      name, *others = (part.strip() for part in (said or short).split(';'))
      kept = tuple(other for other in others if other[0] != '*')
      held = tuple(other[1:] for other in others if other[0] == '*')
      found[short.strip()] = name, kept, held
  return found


def choose(
  sets: Sequence[IconSet], every: Sequence[IconSet], number: int | None
) -> tuple[Thing, ...]:
  """The things that all sets show, those of `icons.txt` first.

  Partial sets have no say, unless there are no others.

  Args:
    sets: of the styles to use.
    every: all that there are, from which the names come.
    number: of things; None: all.

  Raises:
    UsageError: there are fewer than `number`, or fewer than two, or a partial
      set shows fewer than `FEWEST` of them.
  """
  names = names_of(every)
  deciding = [one for one in sets if not one.partial] or sets
  named: dict[str, Thing] = {}
  for code, short in names.items():
    if all(code in one.images for one in deciding):
      # The first of a name, such as the spouting whale, not the other whale.
      named.setdefault((thing := _thing(code, short)).name, thing)
  things = [*named.values()]
  common = [thing.code for thing in things]
  if len(common) < max(2, number or 0):
    styles = ', '.join(one.style for one in deciding)
    raise UsageError(
      f'data.things is {number}, and the styles {styles} '
      f'have {len(common)} named things in common; choose fewer things or '
      'styles, or put a set with names, such as twemoji, beside them.',
      key='config.data.things',
    )
  things, common = things[:number], common[:number]
  for one in sets:
    shown = sum(code in one.images for code in common)
    if one.partial and shown < FEWEST:
      raise UsageError(
        f'data.things is {number}, of which the style {one.style} shows '
        f'{shown}; choose more things, so that it shows {FEWEST}, or leave the '
        'style out.',
        key='config.data.things',
      )
  names_of_things = {thing.name for thing in things}
  said = {name for t in things for name in (t.name, *t.synonyms)}
  taken = {form for name in said for form in (name, plural(name))}
  return tuple(
    dataclasses.replace(
      t,
      synonyms=tuple(s for s in t.synonyms if s not in names_of_things),
      heldout=tuple(h for h in t.heldout if not _within(h, taken)),
    )
    for t in things
  )


def names_of(sets: Iterable[IconSet]) -> dict[str, str]:
  """{code points: Unicode's short name}, those of `icons.txt` first."""
  names: dict[str, str] = {}
  for one in sets:
    names |= {c: n for c, n in one.names.items() if c not in names}
  order = {short: i for i, short in enumerate(listed())}
  first = sorted(names, key=lambda c: (order.get(names[c], len(order)), c))
  return {code: names[code] for code in first}


def by_name(sets: Sequence[IconSet]) -> dict[str, str]:
  """{name: code points}, synonyms of either kind included.

  Of two things that share a name, the one has it whose everyday name it is,
  or else the one that comes first.
  """
  names = names_of(sets)
  things = [_thing(code, short) for code, short in names.items()]
  said = [(thing.name, thing.code) for thing in things]
  said += [(name, code) for one in sets for code, name in one.names.items()]
  said += [(n, t.code) for t in things for n in (*t.synonyms, *t.heldout)]
  found: dict[str, str] = {}
  for name, code in said:
    found.setdefault(name.lower(), code)
  return found


def _thing(code: str, short: str) -> Thing:
  if short in listed():
    name, synonyms, heldout = listed()[short]
    return Thing(name, code, synonyms, heldout)
  # The name of the character, where it is another: 'automobile', 'lady beetle'.
  points = code.split('-')
  character = unicodedata.name(chr(int(points[0], 16)), '').lower()
  other = character.replace('-', ' ')
  known = len(points) == 1 and other and other != short
  # 'kissing face' is no name of a thing, nor is the colour that of the icon.
  odd = other.endswith(' face') or other.startswith(('black ', 'white '))
  return Thing(short, code, (other,) if known and not odd else ())


def _within(phrase: str, names: Iterable[str]) -> bool:
  """Whether a phrase is part of one of the names, in whole words."""
  return any(f' {phrase} '.lower() in f' {name} '.lower() for name in names)


def held_style(thing: Thing, styles: Sequence[str]) -> str | None:
  """The style in which training never shows a thing; None: there is none."""
  if len(styles) < 2:
    return None
  rng = random.Random(f'held-out style of {thing.name}')
  if rng.random() >= HELD_STYLE:
    return None
  return sorted(styles)[int(rng.random() * len(styles))]


@functools.lru_cache(2**20)
def held_pair(a: Thing, b: Thing) -> bool:
  """Whether training never shows two things together, in either order."""
  return emoji.held_out(a.name, b.name)


def is_plural(name: str) -> bool:
  """Whether a name takes no article: 'grapes', 'popcorn', but not 'bus'."""
  if ' and ' in name:  # 'fork and knife'
    return True
  noun = _split(name)[1]
  singular = noun.endswith(('ss', 'us', 'os', 'is'))
  return noun in MASS or (noun.endswith('s') and not singular)


def article(words: str) -> str:
  """'a' or 'an', by sound: 'an hourglass', but 'a unicorn'."""
  words = words.lower()
  sounds = 'uni', 'ufo', 'eu', 'one '  # as if they began with a consonant
  vowel = words[0] in 'aeiou' and not words.startswith(sounds)
  return 'an' if vowel or words.startswith(('hour', 'x ')) else 'a'


def plural(name: str) -> str:
  """'mug of beer' -> 'mugs of beer', 'cherry' -> 'cherries'."""
  before, noun, after = _split(name)
  return name if is_plural(name) else before + _plural(noun) + after


def _split(name: str) -> tuple[str, str, str]:
  """'blue mug of beer' -> ('blue ', 'mug', ' of beer')."""
  link = LINK.search(name)
  end = link.start() if link else len(name)
  before, space, noun = name[:end].rpartition(' ')
  return before + space, noun, name[end:]


def _plural(noun: str) -> str:
  if noun.lower() in IRREGULAR:
    return IRREGULAR[noun.lower()]
  if noun.endswith('y') and noun[-2:-1] not in tuple('aeiou'):
    return noun[:-1] + 'ies'
  if noun.endswith(('s', 'x', 'ch', 'sh', 'ato')):
    return noun + 'es'
  return noun + 's'


def by_style(sets: Iterable[IconSet]) -> Mapping[str, IconSet]:
  """{style: its first set}."""
  found: dict[str, IconSet] = {}
  for one in sets:
    found.setdefault(one.style, one)
  return found
