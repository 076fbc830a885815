"""imagen-embed: writes the text embeddings of a prepared set's captions."""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imagen_jax.cli import errors, runtime
from imagen_jax.cli.index import share
from imagen_jax.errors import UsageError
from imagen_jax.io.paths import check_folder, user_path

if TYPE_CHECKING:
  from imagen_jax.data.embed import Encoder

LENGTH = functools.partial(errors.positive, most=65536)
FLAGS = {'config.text.kind': 'kind', 'config.text.max_len': 'max_len'}


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv, FLAGS)


def _parser() -> errors.Parser:
  parser = errors.Parser(
    prog='imagen-embed',
    description="Write the text embeddings of a prepared set's captions beside "
    'its images. The same command resumes where it stopped; several hosts '
    'share a set with --shard or --distributed.',
  )
  add = parser.add_argument
  add('--path', type=user_path, required=True, help='what imagen-prepare wrote')
  add(
    '--text',
    type=user_path,
    required=True,
    help="the run's text.path: a folder in Hugging Face layout, or demo",
  )
  add('--kind', help="the run's text.kind, if it has one")
  add(
    '--max_len',
    type=LENGTH,
    help="the run's text.max_len; the encoder's own if left out",
  )
  add(
    '--dtype',
    default='float32',
    choices=('float32', 'bfloat16'),
    help="of the encoder, the run's text.dtype",
  )
  add(
    '--store',
    default='bfloat16',
    choices=('bfloat16', 'int8'),
    help='how a number is stored; int8 has a scale for each token',
  )
  add(
    '--out',
    type=user_path,
    help='folder to write; PATH/text/NAME-STORE if left out, with the name of '
    'the encoder',
  )
  add(
    '--shard',
    type=share,
    help='I/N, with I from 0 to N-1: embed every Nth part only, from part I',
  )
  add(
    '--batch_tokens',
    type=errors.positive,
    default=4096,
    help='positions that a device computes at a time: captions × their length',
  )
  add(
    '--fsdp',
    type=errors.positive,
    default=1,
    help="devices of this host over which the encoder's weights are split",
  )
  runtime.add_process_flags(parser)
  return parser


def _main(argv: list[str]) -> None:
  args = _parser().parse_args(argv)
  name = f'{os.path.basename(args.text.rstrip("/"))}-{args.store}'
  out = args.out or f'{args.path.rstrip("/")}/text/{name}'
  check_folder(out, key='out', in_bucket=True)
  runtime.start(processes=args)
  from imagen_jax.data import embed

  shard = _shard(args.shard)
  header = embed.embed(args.path, out, _encoder(args), shard=shard)
  if header is None:
    print(
      f'{out}: the parts of this call are embedded, and others are not yet; '
      'whichever call embeds the last completes the set.'
    )
    return
  print(
    f'{out}: {header["captions"]} captions as {args.store}, '
    f'{header["tokens"] / max(header["captions"], 1):.1f} tokens each, '
    f'{header["bytes"] / 1e6:.1f} MB in {len(header["parts"])} files'
  )
  if header['cut']:
    print(
      f'{header["cut"]} captions were cut at {header["max_len"]} positions; '
      'with a larger --max_len, fewer are.'
    )
  if header['damaged']:
    print(
      f'{header["damaged"]} images have no embeddings, because their records '
      'are damaged; training leaves them out.'
    )


def _shard(given: tuple[int, int] | None) -> tuple[int, int]:
  """(i, n) of `--shard`, or of this process of the job."""
  import jax

  if given is None:
    return jax.process_index(), jax.process_count()
  if jax.process_count() > 1:
    raise UsageError(
      'is not for processes that know of each other, which share the set by '
      'themselves; leave it out.',
      key='shard',
    )
  return given


def _encoder(args: argparse.Namespace) -> 'Encoder':
  """The text encoder, on all devices of this host."""
  import jax

  from imagen_jax import sharding
  from imagen_jax.data import embeddings
  from imagen_jax.data.embed import Encoder
  from imagen_jax.io import text_folder
  from imagen_jax.text.encoder import find_mark, load_text_encoder

  mesh = sharding.make_mesh(fsdp=args.fsdp, devices=jax.local_devices())
  place = None
  if mesh.size > 1:
    place = functools.partial(sharding.leaf_sharding, mesh=mesh)
  folder = text_folder.existing(args.text)
  made = load_text_encoder(
    folder, args.dtype, kind=args.kind, max_len=args.max_len, place=place
  )
  identity: dict[str, Any] = embeddings.identity(
    kind=made.kind,
    dim=made.dim,
    max_len=made.max_len,
    dtype=args.dtype,
    store=args.store,
    encoder=made.digest,
    mark=find_mark(folder, args.kind),
    tokenizer=made.tokenizer.digest,
  )
  count = lambda size: max(1, args.batch_tokens // size) * mesh.size
  return Encoder(
    identity,
    made.tokenize,
    lambda ids, mask: made.encode_tokens(ids, mask, count),
  )


if __name__ == '__main__':
  sys.exit(main())
