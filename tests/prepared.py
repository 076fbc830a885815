"""Prepares a set within a test's process."""

import json

from imagen_jax.data.arrayrecord import (
  ArrayRecordSource,
  pack,
  unpack,
  write_records,
)
from imagen_jax.data.merge import merge
from imagen_jax.data.prepare import prepare_shard
from imagen_jax.data.shards import Spec, claim, plan


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


def add_text(out, embed, header):
  """Adds embeddings to the records of a set.

  Args:
    out: its folder.
    embed: list of captions -> list of bfloat16 [tokens, dim].
    header: of the embeddings.
  """
  found = json.loads((out / 'dataset.json').read_text())
  source = ArrayRecordSource(out, found['size'])
  records = iter(range(len(source)))
  for part in found['parts']:
    new = []
    for _ in range(part['count']):
      i = next(records)
      example, stored = source.example(i), unpack(source._records[i])[0]
      example['captions'] = stored['captions']
      new.append(pack(example, embed(stored['captions'])[0]))
    part['count'], digest = write_records(out / part['name'], new)
    part.update(digest)
  found['text'] = header
  (out / 'dataset.json').write_text(json.dumps(found))
