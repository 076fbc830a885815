"""The meaning of a caption of the shapes world, and its phrasing.

A `Meaning` is the checkable content of a caption: groups of things, relations
between them, a background. `write` phrases a meaning as a person might type
it; a test holds the inverse. Nothing here describes how a shape is
rendered, so the judge may import it.
"""

import dataclasses
import random
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar('T')

SHAPES = tuple('circle square triangle star heart moon cross diamond'.split())
COLOURS = tuple(
  'red orange yellow green blue purple pink white black grey'.split()
)
SIZES = ('small', 'large')
FILLS = ('plain', 'striped', 'dotted', 'checkered')
RELATIONS = ('left of', 'right of', 'above', 'below')
OPPOSITE = dict(zip(RELATIONS, ('right of', 'left of', 'below', 'above')))
BACKGROUNDS = ('white', 'black', 'grey', 'blue', 'green', 'yellow')
NUMBERS = ('one', 'two', 'three', 'four', 'five')

# Synonyms of each word; the first is the usual one.
SAID = {
  'grey': ('grey', 'gray'),
  'purple': ('purple', 'violet'),
  'moon': ('moon', 'crescent'),
  'circle': ('circle', 'disc'),
  'small': ('small', 'little', 'tiny'),
  'large': ('large', 'big', 'huge'),
  'plain': ('plain', 'solid'),
  'striped': ('striped', 'stripy'),
  'dotted': ('dotted', 'spotted'),
  'checkered': ('checkered', 'checked'),
  'left of': ('left of', 'to the left of'),
  'right of': ('right of', 'to the right of'),
  'above': ('above', 'over'),
  'below': ('below', 'under', 'beneath'),
}
WITH = {'striped': 'stripes', 'dotted': 'dots', 'checkered': 'checks'}
PALE = ('blue', 'green', 'yellow')  # backgrounds that may be called 'light'
OPENINGS = ('a picture of ', 'a drawing of ', 'an image of ', 'there is ')


@dataclasses.dataclass(frozen=True)
class Group:
  """`count` (1 to 5) things alike; None: the caption does not say."""

  shape: str
  colour: str | None
  count: int = 1
  size: str | None = None
  fill: str | None = None


@dataclasses.dataclass(frozen=True)
class Meaning:
  """What must be true of an image for its caption to be true.

  `relations` holds (a, word, b): group a is `word` group b; a and b are indices
  into `groups`. The image shows these groups and nothing else.
  """

  groups: tuple[Group, ...]
  relations: tuple[tuple[int, str, int], ...] = ()
  background: str | None = None


def pick(rng: random.Random, options: Sequence[T]) -> T:
  """A uniform choice from `rng.random()`, whose stream never changes."""
  return options[int(rng.random() * len(options))]


def _say(rng: random.Random, word: str, usual: float = 0.7) -> str:
  """The word itself with probability `usual`, else one of its synonyms."""
  ways = SAID.get(word, (word,))
  if len(ways) == 1 or rng.random() < usual:
    return ways[0]
  return pick(rng, ways[1:])


def synonyms(words: Iterable[str]) -> dict[str, str]:
  """{synonym: word} of some words."""
  return {way: word for word in words for way in SAID.get(word, (word,))}


def plural(noun: str) -> str:
  """'star' -> 'stars', 'cross' -> 'crosses'."""
  return noun + ('es' if noun.endswith('s') else 's')


def article_of(word: str) -> str:
  """'a' or 'an'."""
  return 'an' if word[0] in 'aeiou' else 'a'


def _phrase(rng: random.Random, group: Group, article: bool) -> str:
  """A noun phrase: 'a small striped green heart', 'three stars'."""
  words, tail = [], ''
  if group.size:
    words.append(_say(rng, group.size))
  if group.colour:
    words.append(_say(rng, group.colour, usual=0.85))
  if group.fill in WITH and rng.random() < 0.2:
    tail = ' with ' + WITH[group.fill]
  elif group.fill:
    first = rng.random() < 0.7
    words.insert(len(words) - first, _say(rng, group.fill))
  noun = _say(rng, group.shape, usual=0.85)
  number = NUMBERS[group.count - 1]
  if group.count > 1:
    noun = plural(noun)
    number = number if rng.random() < 0.85 else str(group.count)
  elif article:
    number = article_of([*words, noun][0])
  return ' '.join([number, *words, noun]) + tail


def _sentence(
  rng: random.Random, meaning: Meaning, nouns: Sequence[str]
) -> str:
  """The noun phrases joined by the meaning's relations, if any."""
  if not meaning.relations:
    return ' and '.join(filter(None, [', '.join(nouns[:-1]), nouns[-1]]))
  # Every relation of a scene has its first group as the subject.
  said = [_say(rng, word) for _, word, _ in meaning.relations]
  verb = ' is ' if rng.random() < 0.1 else ' '
  if len(said) == 1 and rng.random() < 0.1:
    # 'a blue square with a red circle above it'
    return f'{nouns[1]} with {nouns[0]} {said[0]} it'
  return f'{nouns[0]}{verb}' + ' and '.join(
    f'{word} {nouns[b]}' for word, (_, _, b) in zip(said, meaning.relations)
  )


def write(
  rng: random.Random, meaning: Meaning, *, count_one: bool = False
) -> str:
  """Phrases `meaning` as a caption that a person might type.

  Only `rng.random()` is used: Python guarantees that its stream never changes.
  With `count_one`, a single thing is 'one red star', not 'a red star'.
  """
  nouns = [_phrase(rng, g, article=not count_one) for g in meaning.groups]
  text = _sentence(rng, meaning, nouns)
  if meaning.background:
    name = _say(rng, meaning.background, usual=0.85)
    if meaning.background in PALE and rng.random() < 0.6:
      name = 'light ' + name
    text += f' on a {name} background' if rng.random() < 0.8 else f' on {name}'
  if rng.random() < 0.1 and ' is ' not in text:
    opening = pick(rng, OPENINGS)
    if opening == 'there is ' and meaning.groups[0].count > 1:
      opening = 'there are '
    text = opening + text
  if rng.random() < 0.1:
    text = text[0].upper() + text[1:] + '.'
  return text


def words(text: str) -> list[str]:
  """The words of a prompt, lower case, without punctuation."""
  return re.findall(r"[a-z0-9']+", text.lower())


def vocabulary() -> frozenset[str]:
  """Every word a caption can contain."""
  found = set('a an and background is there are on light with it'.split())
  for word in (*SHAPES, *COLOURS, *SIZES, *FILLS, *RELATIONS, *BACKGROUNDS):
    for way in SAID.get(word, (word,)):
      found.update(way.split())
      if word in SHAPES:
        found.add(plural(way))
  for number, word in enumerate(NUMBERS, 1):
    found.update((word, str(number)))
  found.update(WITH.values(), *(words(opening) for opening in OPENINGS))
  return frozenset(found - {'1'})


def describe() -> str:
  """One sentence on what can be rendered, for the out-of-vocabulary note."""

  def listed(items: Sequence[str]) -> str:
    return ', '.join(items[:-1]) + ' or ' + items[-1]

  return (
    f'It renders one to five {listed([plural(s) for s in SHAPES])}, in '
    f'{listed(COLOURS)}, {listed(SIZES)}, {listed(FILLS)}, '
    f'{listed(RELATIONS)} one another, on a {listed(BACKGROUNDS)} background.'
  )
