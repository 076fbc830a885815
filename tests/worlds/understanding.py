"""Parses the sentences of the shapes world, the inverse of `captions.write`.

`understand` parses every sentence that `write` can write, which shows that a
caption says what its scene shows, and small variations of them, so that a test
can state a meaning as a prompt.
"""

import re
from typing import Any

from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import Group, Meaning
from imagen_jax.worlds.shapes import COLOUR_WORDS as _COLOURS
from imagen_jax.worlds.shapes import SHAPE_WORDS as _SHAPES

_ADJECTIVES = {
  'size': captions.synonyms(captions.SIZES),
  'fill': captions.synonyms(captions.FILLS),
  'colour': _COLOURS,
}
_RELATIONS = captions.synonyms(captions.RELATIONS)
_WITH = {said: fill for fill, said in captions.WITH.items()}
_NUMBERS = {'a': 1, 'an': 1, 'the': 1}
for n, spelled in enumerate(captions.NUMBERS, 1):
  _NUMBERS |= {spelled: n, str(n): n}

_BACKGROUND = re.compile(
  r',? (?:on|against) (?:an? |the )?(?:light |pale )?(\w+)(?: background)?$'
)
_OPENING = re.compile(
  r'^(?:(?:an? )?(?:picture|drawing|image) of |there (?:is|are) )'
)
# Longest first, so that 'to the left of' is not taken for 'left of'.
_WAYS = '|'.join(sorted(_RELATIONS, key=len, reverse=True))
_RELATION = re.compile(rf' (?:is |are )?(?:and )?({_WAYS}) ')
_TRAILING = re.compile(rf'^(.+) with (.+?) ({_WAYS}) (?:it|them)$')
_AND = re.compile(r',? and |, ')


def _group(phrase: str) -> Group | None:
  """The group a noun phrase names, or None."""
  phrase, _, tail = phrase.partition(' with ')
  *before, noun = phrase.split() or ['']
  if noun not in _SHAPES or (tail and tail not in _WITH):
    return None
  fields: dict[str, Any] = {'fill': _WITH[tail]} if tail else {}
  if before and before[0] in _NUMBERS:
    fields['count'] = _NUMBERS[before.pop(0)]
  for word in before:
    for field, words in _ADJECTIVES.items():
      if word in words and field not in fields:
        fields[field] = words[word]
        break
    else:
      return None
  return Group(_SHAPES[noun], **{'colour': None} | fields)


def understand(prompt: str) -> Meaning | None:
  """The `Meaning` of a prompt, or None when a part is not understood."""
  text = ' '.join(re.sub(r'[.!]', ' ', prompt.lower()).split())
  text = _OPENING.sub('', text)
  background = None
  if found := _BACKGROUND.search(text):
    background = _COLOURS.get(found[1])
    if background not in captions.BACKGROUNDS:
      return None
    text = text[: found.start()]
  relations: tuple[tuple[int, str, int], ...] = ()
  if found := _TRAILING.match(text):
    phrases = [found[2], found[1]]
    relations = ((0, _RELATIONS[found[3]], 1),)
  elif _RELATION.search(text):
    first, *rest = _RELATION.split(text)
    phrases = [first, *rest[1::2]]
    relations = tuple(
      (0, _RELATIONS[way], i) for i, way in enumerate(rest[::2], 1)
    )
  else:
    phrases = _AND.split(text)
  groups = [group for phrase in phrases if (group := _group(phrase))]
  if len(groups) < len(phrases):
    return None
  return Meaning(tuple(groups), relations, background)
