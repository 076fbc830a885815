"""Prepares a set within a test's process."""

import numpy as np

from imagen_jax.data import embeddings
from imagen_jax.data.claim import claim
from imagen_jax.data.embed import Encoder, embed
from imagen_jax.data.merge import merge
from imagen_jax.data.prepare import prepare_shard
from imagen_jax.data.shards import Spec, plan


def begun(out, *, size=16, max_bad=0.01, **options):
  """(spec, shards) of a folder that was claimed for them.

  Args:
    out: the folder.
    size, max_bad: see `Spec` and `plan`.
    **options: of `Spec`, or the source's.
  """
  own = {k: options.pop(k) for k in KEYS if k in options}
  source = {'split': 'train', 'resize': 'area', 'seed': 0} | options
  spec, shards = plan(Spec(source, size, **own), max_bad=max_bad)
  return spec, claim(out, spec, shards)


KEYS = ('encoding', 'number', 'part_size')


def prepare(out, *, max_bad=0.01, remove_duplicates=False, **options):
  """The report of a set prepared as `begun` describes."""
  spec, shards = begun(out, max_bad=max_bad, **options)
  for shard in shards:
    prepare_shard(shard, out, spec)
  return merge(out, max_bad=max_bad, remove_duplicates=remove_duplicates)


# What made embeddings of three numbers, of five words at most.
TEXT = {'kind': 't5', 'dim': 3, 'max_len': 5, 'dtype': 'float32'}
TEXT |= {'encoder': 'e' * 64, 'tokenizer': 't' * 64, 'mark': 'm' * 64}


def encoder(store='bfloat16', **identity):
  """A fake text encoder: a token is a word, numbered (caption, word, 0.1)."""

  def tokenize(captions):
    counts = [len(caption.split()) for caption in captions]
    mask = np.arange(5) < np.array(counts, int)[:, None]
    return np.array(captions, object), mask, np.maximum(counts, 5) - 5

  def encode(captions, mask):
    for i in reversed(range(len(captions))):  # in any order
      number = int(captions[i].split()[1])
      words = range(int(mask[i].sum()))
      yield i, np.array([[number, n, 0.1] for n in words], np.float32)

  made = embeddings.identity(**TEXT | {'store': store} | identity)
  return Encoder(made, tokenize, encode)


def add_text(out, name='fake', made=None, **identity):
  """Embeds the captions of a set; returns the folder."""
  folder = out / 'text' / name
  assert embed(out, folder, made or encoder(**identity))
  return folder
