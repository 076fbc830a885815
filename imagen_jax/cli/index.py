"""imagen-index: makes the index of tars, which training reads them by."""

import argparse
import collections
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from imagen_jax.cli import errors
from imagen_jax.errors import DataError, ImagenError, UsageError
from imagen_jax.io.paths import user_path

if TYPE_CHECKING:
  from imagen_jax.data.tar_index import Found

AHEAD = 4  # tars that each worker may be ahead of what is written


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv, {})


def share(text: str) -> tuple[int, int]:
  """'3/64' -> (3, 64)."""
  match = re.fullmatch(r'(\d+)/(\d+)', text)
  number, total = map(int, match.groups()) if match else (0, 0)
  if not 0 <= number < total:
    raise argparse.ArgumentTypeError('it is I/N, with 0 <= I < N')
  return number, total


def _parser() -> errors.Parser:
  parser = errors.Parser(
    prog='imagen-index',
    description='Find the samples of webdataset tars, once, on one machine or '
    'on many: imagen-index --path P --part I/N --out I.index on each, then '
    'imagen-index --path P --merge *.index.',
  )
  add = parser.add_argument
  add(
    '--path',
    type=user_path,
    required=True,
    help="the tars, as data.path has them: 'shards/*.tar', or in a bucket",
  )
  add(
    '--out',
    type=user_path,
    help='file to write, which data.index then names; tars.index in the common '
    'folder of the tars if left out, where training finds it',
  )
  add(
    '--part',
    type=share,
    help='I/N, with I from 0 to N-1: index every Nth tar only, from tar I',
  )
  add('--merge', type=user_path, nargs='+', help='join these indexes of parts')
  add(
    '--workers',
    type=errors.positive,
    default=os.cpu_count() or 1,
    help='processes; as many as there are cores if left out',
  )
  return parser


def _main(argv: list[str]) -> None:
  args = _parser().parse_args(argv)
  if args.part and args.merge:
    raise UsageError('has no effect with --merge.', key='part')
  if args.part and not args.out:
    raise UsageError('is needed with --part, a file for each.', key='out')
  from imagen_jax.data import tar_index, tar_update
  from imagen_jax.data.webdataset import find_tars

  errors.catch_interrupts()

  tars = [*find_tars(args.path)]
  root = tar_update.common_folder(tars)
  names = {tar_update.below(root, tar): tar for tar in tars}
  out = args.out or f'{root}/{tar_index.NAME}'
  tar_index.check_place(out, key='out')
  if args.merge:
    found = _merged(args, names)
  else:
    first, step = args.part or (0, 1)
    some = sorted(names)[first::step]
    found = _scan({name: names[name] for name in some}, args.workers)
  tar_index.write(out, found)
  index = tar_index.Index(tar_index.local(out))
  left = sum(tar.bad for tar in index.tars.values())
  print(
    f'{out}: {len(index.rows)} samples in {len(index.tars)} tars; {left} are '
    'left out'
  )
  for name, key, reason in index.bad():
    print(f'  {name}/{key}: {reason}', file=sys.stderr)


def _merged(
  args: argparse.Namespace, names: Mapping[str, str]
) -> 'Iterator[Found]':
  """What is in the tars of several indexes, which have all of them."""
  from imagen_jax.data import tar_index

  parts = [tar_index.Index(tar_index.local(part)) for part in args.merge]
  have = {name for part in parts for name in part.tars}
  if missing := sorted(names.keys() ^ have):
    raise DataError(
      f'the parts and {args.path} are not of the same tars: {missing[0]} is in '
      'one of them only; give the path and all parts of one set.'
    )
  return tar_index.merge(parts)


def _scan(tars: Mapping[str, str], workers: int) -> 'Iterator[Found]':
  """What is in tars {name: path}, in order, found by several processes."""
  from imagen_jax.data.progress import Progress
  from imagen_jax.data.tar_scan import scan

  progress = Progress('indexing: tars', len(tars))
  if workers == 1 or len(tars) == 1:
    each: Iterator[Found] = (scan(path, name) for name, path in tars.items())
  else:
    each = _in_processes(scan, tars, workers)
  for found in each:
    yield found
    progress.add()
  progress.close()


def _in_processes(
  scan: 'Callable[[str, str], Found]', tars: Mapping[str, str], workers: int
) -> 'Iterator[Found]':
  """`scan(path, name)` of tars {name: path}, in order.

  Raises:
    ImagenError: a process was killed.
  """
  # Not forked: a bucket's library has threads.
  spawn = multiprocessing.get_context('spawn')
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
      for name, path in tars.items():
        waiting.append(pool.submit(scan, path, name))
        if len(waiting) > AHEAD * workers:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise ImagenError(
      'a process that indexed tars was killed, perhaps for lack of memory; run '
      'the command again with fewer --workers.'
    ) from error


if __name__ == '__main__':
  sys.exit(main())
