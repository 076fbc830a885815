r"""Images per second of the data loader alone, compared with training.

  python benchmarks/loader.py --workdir runs/shapes/base --size 16
  python benchmarks/loader.py --workdir runs/mine/base --size 64 \
      --kind webdataset --path 'shards/*.tar'

The loader is that of training: source, order, tokens, batches, prefetching
threads or `--workers` processes. The rate of training is the median
`images_per_sec` of the workdir's `metrics.jsonl`; it should be from the same
machine. Nothing else should be running.
"""

import argparse
import json
import pathlib
import statistics
import time

from imagen_jax.data.pipeline import Order, batches
from imagen_jax.data.sources import make_source
from imagen_jax.io import text_folder
from imagen_jax.text.tokenizer import load_tokenizer


def loader_rate(source, tokenizer, *, order, max_len, seconds, workers):
  """Images per second over `seconds`, after 20 batches of warm-up."""

  def transform(example):
    ids, mask, _ = tokenizer([example['caption']], max_len)
    return {'image': example['image'], 'ids': ids[0], 'mask': mask[0]}

  data = batches(source, order, transform=transform, workers=workers)
  for _ in range(20):  # discard batches that were prefetched
    next(data)
  start, images = time.perf_counter(), 0
  while time.perf_counter() - start < seconds:
    next(data)
    images += order.batch_size
  return images / (time.perf_counter() - start)


def training_rate(workdir):
  """The median images per second in a run's metrics, or None."""
  file = pathlib.Path(workdir) / 'metrics.jsonl'
  if not file.exists():
    return None
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  return statistics.median(row['images_per_sec'] for row in rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kind', default='shapes')
  parser.add_argument('--path')
  parser.add_argument('--size', type=int, default=16)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--max_len', type=int, default=32)
  parser.add_argument('--text', default='demo')
  parser.add_argument('--workers', type=int, default=0, help='processes')
  parser.add_argument('--seconds', type=float, default=10)
  parser.add_argument('--workdir', help='of a run to compare with')
  args = parser.parse_args()
  rate = loader_rate(
    make_source(kind=args.kind, path=args.path, size=args.size),
    load_tokenizer(text_folder.find(args.text)),
    order=Order(0, args.batch_size),
    max_len=args.max_len,
    seconds=args.seconds,
    workers=args.workers,
  )
  print(f'loader: {rate:.0f} images/s of {args.kind} at {args.size} pixels')
  takes = training_rate(args.workdir) if args.workdir else None
  if takes:
    print(f'training: {takes:.0f} images/s; the loader has {rate / takes:.1f}×')


if __name__ == '__main__':
  main()
