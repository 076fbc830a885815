"""Parses a typed prompt of the shapes world into its meaning.

`understand` parses every sentence that `captions.write` can write and small
variations of them, so an image sampled from a typed prompt can be judged like
any other.
"""

import re

from imagen_jax.worlds import captions
from imagen_jax.worlds.captions import Group, Meaning


def _said(group):
  """{synonym: word} of a tuple of words."""
  return {
    way: word for word in group for way in captions.SAID.get(word, (word,))
  }


_COLOURS = _said(captions.COLOURS)
_SIZES, _FILLS = _said(captions.SIZES), _said(captions.FILLS)
_SHAPES = _said(captions.SHAPES)
_SHAPES |= {captions.plural(way): word for way, word in _SHAPES.items()}
_RELATIONS = _said(captions.RELATIONS)
_WITH = {said: fill for fill, said in captions.WITH.items()}
_NUMBERS = {'a': 1, 'an': 1, 'the': 1}
_NUMBERS |= {word: n for n, word in enumerate(captions.NUMBERS, 1)}
_NUMBERS |= {str(n): n for n in range(1, 6)}

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


def _group(phrase):
  """The group a noun phrase names, or None."""
  phrase, _, tail = phrase.partition(' with ')
  *before, noun = phrase.split() or ['']
  fields = {'fill': _WITH.get(tail)} if tail else {}
  if noun not in _SHAPES or (tail and tail not in _WITH):
    return None
  for i, word in enumerate(before):
    if i == 0 and word in _NUMBERS:
      fields['count'] = _NUMBERS[word]
      continue
    for field, words in (
      ('size', _SIZES),
      ('fill', _FILLS),
      ('colour', _COLOURS),
    ):
      if word in words and field not in fields:
        fields[field] = words[word]
        break
    else:
      return None
  return Group(_SHAPES[noun], fields.pop('colour', None), **fields)


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
  groups = tuple(_group(phrase) for phrase in phrases)
  if None in groups:
    return None
  return Meaning(groups, relations, background)
