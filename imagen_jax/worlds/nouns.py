"""Finds the nouns of a caption of the shapes world."""

from imagen_jax.worlds import captions

NOUNS = {
  word + ending: shape
  for shape in captions.SHAPES
  for word in captions.SAID.get(shape, (shape,))
  for ending in ('', 's', 'es')
}
COLOURS = {
  word: colour
  for colour in captions.COLOURS
  for word in captions.SAID.get(colour, (colour,))
}


def shape_nouns(tokenizer, caption, meaning):
  """Where things are named: [(position of the noun's last token, group)].

  A noun belongs to the group with its shape and the last colour before it, so
  the caption may name the groups in any order. Words are tokenized one by one,
  as sentencepiece does.
  """
  found, position, colour = [], 0, None
  groups = [(g.shape, g.colour) for g in meaning.groups]
  for word in caption.lower().split():
    bare = word.strip('.,')
    colour = COLOURS.get(bare, colour)
    key = NOUNS.get(bare), colour
    if key in groups:
      last = position + len(tokenizer.pieces(bare)) - 1
      found.append((last, groups.index(key)))
    position += len(tokenizer.pieces(word))
  return found
