r"""Time and memory of `imagen-prepare --merge` on a set of many parts.

python benchmarks/merge.py --parts 1000

The parts are reports of 10,000 images each, one in a hundred of which is in
every part, beside files of a few bytes: the merge does not look into them.
"""

import argparse
import base64
import hashlib
import json
import pathlib
import resource
import tempfile
import time

import numpy as np

from imagen_jax.data import shards
from imagen_jax.data.claim import claim
from imagen_jax.data.merge import merge
from imagen_jax.data.prepare import DIGEST, WORDS

IMAGES, SAME = 10_000, 100


def write(folder, number):
  """A claimed folder with the reports of that many parts."""
  spec = shards.Spec(
    {'kind': 'shapes'}, 64, number=number * IMAGES, part_size=IMAGES
  )
  of, rng = shards.digest(spec.header()), np.random.default_rng(0)
  ranges = shards.ranges_of(spec.number, IMAGES)
  for shard in claim(folder, spec, ranges):
    digests = rng.bytes(DIGEST * (IMAGES - SAME)) + bytes(range(DIGEST)) * SAME
    part = {'format_version': shards.FORMAT_VERSION, 'name': shard.file}
    part |= {'shard': shard.identity, 'spec': of, 'count': IMAGES, 'bytes': 4}
    part |= {'sha256': hashlib.sha256(b'part').hexdigest()}
    part |= {'buckets': [[64, 64, IMAGES]], 'words': [0] * (len(WORDS) + 1)}
    part |= {'bad': 0, 'unlisted': {}, 'thumbnails': [], 'dropped': []}
    part |= {'digests': base64.b64encode(digests).decode()}
    file = folder / shard.file
    file.write_bytes(b'part')
    file.with_suffix('.json').write_text(json.dumps(part))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--parts', type=int, default=1000)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    write(pathlib.Path(folder), args.parts)
    start = time.monotonic()
    found = merge(folder, max_bad=0, remove_duplicates=True)
    seconds = time.monotonic() - start
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(
    f'{args.parts} parts with {args.parts * IMAGES / 1e6:.1f} M images: '
    f'{seconds:.1f} s, peak memory {peak:.0f} MB; '
    f'{found["duplicates"]["removed"]} duplicates'
  )


if __name__ == '__main__':
  main()
