r"""Start of a run on tars with a large index: time and memory of a process.

  python benchmarks/index_start.py --samples 50e6 --folder /tmp/large

The tars are empty files of the right size, the index is synthetic. A second
call uses what the first one made.
"""

import argparse
import pathlib
import time

import numpy as np

from imagen_jax.data import tar_index
from imagen_jax.data.tar_index import ROW, SIZE, Found, Tar
from imagen_jax.data.webdataset import WebDatasetSource

EACH = 10_000  # samples in a tar
BYTES = 40_000  # of an image


def make(folder, count):
  """Writes empty tars and their index."""
  rng = np.random.default_rng(0)
  rows = np.zeros(EACH, ROW)
  rows['image'] = np.arange(EACH) * (BYTES + 1536) + 512
  rows['image_size'], rows['text_size'] = BYTES, 100
  rows['text'] = rows['image'] + BYTES + 512
  for number in range(count):
    file = folder / f'{number:05d}.tar'
    with file.open('wb') as tar:
      tar.truncate(EACH * (BYTES + 1536))
    state = file.stat()
    rows['crc'] = rng.integers(0, 2**32, EACH)
    sizes = rng.integers(200, 600, (EACH, 2)).astype(SIZE.base)
    one = Tar(file.name, state.st_size, state.st_mtime_ns)
    yield Found(one, rows, sizes, {})


def memory():
  """(private, mapped) memory of this process, in MB."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  found = dict(line.split(':') for line in lines)
  return [int(found[k].split()[0]) / 1e3 for k in ('RssAnon', 'RssFile')]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--samples', type=float, default=50e6)
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  args = parser.parse_args()
  index = args.folder / tar_index.NAME
  if not index.exists():
    args.folder.mkdir(parents=True, exist_ok=True)
    tar_index.write(index, make(args.folder, int(args.samples) // EACH))
  before, start = memory(), time.perf_counter()
  source = WebDatasetSource(args.folder, 256)
  number, fingerprint = len(source), source.fingerprint
  seconds = time.perf_counter() - start
  more = [after - now for after, now in zip(memory(), before)]
  print(
    f'{number} of {args.samples:.0f} samples are used ({fingerprint[:8]}): '
    f'{seconds:.2f} s, {more[0]:.0f} MB private and {more[1]:.0f} MB mapped'
  )
  start, picks = time.perf_counter(), 20_000
  for i in np.random.default_rng(1).integers(0, number, picks):
    source._index.rows[source._rows[int(i)]].item()
  print(f'{(time.perf_counter() - start) / picks * 1e6:.0f} us a look-up')


if __name__ == '__main__':
  main()
