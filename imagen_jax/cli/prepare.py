"""imagen-prepare: writes a source of captioned images, resized, to disk.

imagen-prepare …                  all cores of this machine, then the merge
imagen-prepare … --shard I/N      one job of an array; imagen-prepare --merge
imagen-prepare … --runner R       workers of Apache Beam, then the merge
"""

import argparse
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from imagen_jax.cli import errors
from imagen_jax.cli.index import share
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io.paths import check_folder, user_path

if TYPE_CHECKING:
  from imagen_jax.data.prepare import Outcome
  from imagen_jax.data.shards import Shard, Spec

SAID = 10  # lost shards, and reasons, that the last lines name
SIDE = functools.partial(errors.positive, most=65536)
# Keys of a config's `data` section that have a flag of their name.
SETTINGS = (
  'path', 'split', 'seed', 'resize', 'aspect', 'where', 'captions', 'styles',
  'things', 'licences',
)  # fmt: skip
# The flags of keys of a config's `data` section.
FLAGS = {f'config.data.{key}': key for key in (*SETTINGS, 'max_bad')} | {
  'config.data.kind': 'source'
}
# What a merge, which sees no source, takes.
MERGING = {'merge', 'out', 'max_bad', 'remove_duplicates'}


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv, FLAGS)


def _parser() -> errors.Parser:
  parser = errors.Parser(
    prog='imagen-prepare',
    description='Write captioned images as ArrayRecord, resized once. The same '
    'command resumes where it stopped, on one machine or on many.',
  )
  add = parser.add_argument
  add(
    '--source',
    help='kind of source: folder, webdataset, tfds, arrayrecord, shapes, emoji '
    'or icons',
  )
  add('--path', type=user_path, help="where it is, such as 'shards/*.tar'")
  add('--size', type=SIDE, help='side of the images in pixels')
  add('--out', type=user_path, required=True, help='folder to write, or gs://…')
  add('--resize', default='area', help='area, bicubic or lanczos')
  add('--aspect', default='crop', help='crop, pad or buckets, see data.aspect')
  add(
    '--where',
    nargs='+',
    help="conditions that images must meet, such as 'side>=512'",
  )
  add('--captions', nargs='+', help='columns of the metadata with captions')
  add('--split', default='train', choices=('train', 'eval'), help='which part')
  add('--seed', type=int, default=0, help='of shapes, emoji and icons')
  add('--styles', nargs='+', help='of icons, such as 3D flat')
  add('--things', type=errors.positive, help='of icons: their number')
  add('--licences', nargs='+', help='of icons, by SPDX name, such as MIT')
  add('--num', type=errors.positive, help='write the first NUM images only')
  add(
    '--max_bad',
    type=float,
    default=0.01,
    help='fraction of the images that may be bad or in lost shards',
  )
  add(
    '--encode',
    default='raw',
    help='how images are stored: raw (pixels), png (lossless), jpeg or webp',
  )
  add(
    '--quality',
    type=functools.partial(errors.positive, most=100),
    help='of jpeg and webp, 95 if left out',
  )
  add(
    '--part_size',
    type=errors.positive,
    help='images in one file; as many as take about 64 MB if left out. Of a '
    'tar it is all',
  )
  add(
    '--remove_duplicates',
    action='store_true',
    help='leave out an image that is equal to one before it',
  )
  _add_workers(add)
  return parser


def _add_workers(add: Callable[..., Any]) -> None:
  add(
    '--workers',
    type=errors.positive,
    help='processes; as many as this one may use cores if left out',
  )
  add(
    '--shard',
    type=share,
    help='I/N, with I from 0 to N-1: prepare every Nth shard only, from shard '
    'I; afterwards --merge',
  )
  add(
    '--merge',
    action='store_true',
    help='join what was prepared in --out; needs no --source',
  )
  add(
    '--runner',
    help='of Apache Beam, which shares out the shards: DirectRunner, '
    'DataflowRunner, FlinkRunner or SparkRunner',
  )
  add('beam', nargs='*', help='options of Beam, after --')


def _main(argv: list[str]) -> None:
  args = _check(_parser(), argv)
  check_folder(args.out, key='out', in_bucket=True)
  if args.merge:
    return _merge(args)
  from imagen_jax.data import claim, encoding, shards

  errors.catch_interrupts()
  quality = args.quality or encoding.QUALITY.get(args.encode)
  settings = {key: getattr(args, key) for key in SETTINGS}
  spec = shards.Spec(
    {'kind': args.source, **settings},
    args.size,
    encoding.Encoding(args.encode, quality),
    args.num,
    args.part_size or 0,
  )
  spec, found = shards.plan(spec, max_bad=args.max_bad)
  found = claim.claim(args.out, spec, found)
  first, step = args.shard or (0, 1)
  some = found[first::step]
  if args.runner:
    _with_beam(args, spec, some)
  else:
    _locally(args, spec, some)
  if args.shard is None:
    _merge(args)


def _check(parser: errors.Parser, argv: list[str]) -> argparse.Namespace:
  """The arguments, which make sense together."""
  args = parser.parse_args(argv)
  for one, other in (('shard', 'merge'), ('workers', 'merge')):
    if getattr(args, one) and getattr(args, other):
      raise UsageError(f'has no effect with --{other}.', key=one)
  if args.beam and not args.runner:
    raise UsageError(f'{args.beam[0]} has no effect without --runner.')
  if args.shard and args.remove_duplicates:
    raise UsageError(
      'has an effect with --merge, not with --shard.', key='remove_duplicates'
    )
  if args.merge:
    if extra := sorted(parser.given(argv) - MERGING - {'beam'}):
      raise UsageError('has no effect with --merge.', key=extra[0])
  for key in ('source', 'size'):
    if not args.merge and not getattr(args, key):
      raise UsageError('is needed, unless --merge is given.', key=key)
  return args


def _locally(
  args: argparse.Namespace, spec: 'Spec', shards: Sequence['Shard']
) -> None:
  """Prepares shards in processes of this machine."""
  from imagen_jax.data.prepare import attempt

  cores = args.workers or _cores()
  processes = max(1, min(cores, len(shards)))
  monitor = _Monitor(args.out, shards)
  work = functools.partial(
    attempt, out=args.out, spec=spec, threads=max(1, cores // processes)
  )
  if processes == 1:
    for i, shard in enumerate(shards):
      monitor.done(i, work(shard, tell=functools.partial(monitor.news, i)))
  else:
    from imagen_jax.data import processes as pool

    for kind, i, value in pool.share(work, shards, processes):
      if kind == pool.NEWS:
        monitor.news(i, *value)
      else:
        monitor.done(i, value)
  monitor.close(args.shard, processes)
  lost = len(monitor.lost)
  if args.shard and lost > args.max_bad * len(shards):
    raise DataError(
      f'{lost} of the {len(shards)} shards of this job could not be prepared: '
      f'{" ".join(monitor.lost[:3])} Run the same command again.'
    )


def _cores() -> int:
  """Of the machine, or of this job's share of it."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class _Monitor:
  """Shows how far the shards are, and says at once which are lost.

  Attributes:
    lost: a sentence on each shard that could not be prepared.
  """

  def __init__(self, out: str, shards: Sequence['Shard']) -> None:
    from imagen_jax.data.progress import Progress

    self._out, self._shards, self._start = out, shards, time.monotonic()
    self._progress = Progress(f'{out}: images', len(shards))
    # (samples done, samples) of the shards that were worked on.
    self._counts: dict[int, tuple[int, int]] = {}
    self._finished = 0
    self.lost: list[str] = []

  def news(self, i: int, done: int, total: int) -> None:
    """What a worker tells of shard `i`."""
    self._counts[i] = done, total
    all_done = sum(done for done, _ in self._counts.values())
    known = sum(total for _, total in self._counts.values())
    # The other shards are taken to be as large as those that are open.
    rest = len(self._shards) - len(self._counts) - self._finished
    self._progress.at(all_done, known + rest * known // len(self._counts))

  def done(self, i: int, outcome: 'Outcome | None') -> None:
    """What became of shard `i`; None: its workers died."""
    self._finished += i not in self._counts
    problem = outcome.problem if outcome else (
      'its process was killed time after time, perhaps for lack of memory; use '
      'fewer --workers.'
    )  # fmt: skip
    if problem:
      self.lost.append(f'{self._shards[i]}: {problem}')
      print(f'lost: {self.lost[-1]}', file=sys.stderr)

  def close(self, shard: tuple[int, int] | None, processes: int) -> None:
    """Writes what was measured, apart from the data, which repeat exactly."""
    self._progress.close()
    images = sum(done for done, _ in self._counts.values())
    if not images:
      return
    from imagen_jax.data.merge import TIMING
    from imagen_jax.io import bucket, files

    first, step = shard or (0, 1)
    seconds = round(time.monotonic() - self._start, 3)
    found = {'images': images, 'processes': processes, 'seconds': seconds}
    name = TIMING.format(f'{first}-of-{step}')
    files.write_json(bucket.at(self._out) / name, found)


def _with_beam(
  args: argparse.Namespace, spec: 'Spec', shards: Sequence['Shard']
) -> None:
  """Prepares shards by workers of Apache Beam."""
  from imagen_jax.cli import beam
  from imagen_jax.data.prepare import attempt

  work = functools.partial(attempt, out=args.out, spec=spec)
  beam.run(work, shards, args.runner, args.beam, args.workers or _cores())


def _merge(args: argparse.Namespace) -> None:
  """Joins the parts and prints what there is."""
  from imagen_jax.data import merge, report

  errors.catch_interrupts()
  found = merge.merge(
    args.out, max_bad=args.max_bad, remove_duplicates=args.remove_duplicates
  )
  again = found['duplicates']
  print(
    f'{args.out}: {found["kept"]} images of {found["size"]} pixels as '
    f'{found["encode"]}, {found["bytes"] / 1e6:.1f} MB in {found["shards"]} '
    f'files; {again["found"]} exact duplicates, {again["removed"]} removed'
  )
  lost = found['lost']
  for one in lost[:SAID]:
    print(f'lost: {one["shard"]}: {one["reason"]}', file=sys.stderr)
  if len(lost) > SAID:
    print(f'lost: {len(lost) - SAID} more, see the report', file=sys.stderr)
  dropped = sorted(found['dropped'].items(), key=lambda d: -d[1]['number'])
  if dropped:
    number = sum(entry['number'] for _, entry in dropped)
    said = '; '.join(
      f'{entry["number"]} because {reason} ({", ".join(entry["examples"])})'
      for reason, entry in dropped[:SAID]
    )
    print(
      f'{number} were left out, see {pathlib.Path(args.out) / report.HTML}: '
      f'{said}'
    )


if __name__ == '__main__':
  sys.exit(main())
