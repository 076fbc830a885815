"""imagen-prepare: writes a source of captioned images, resized, to disk."""

import argparse
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imagen_jax.cli import errors
from imagen_jax.errors import UsageError
from imagen_jax.io.paths import check_folder, user_path

if TYPE_CHECKING:
  import numpy as np

  from imagen_jax.data.prepare import Embed

TEXT_BATCH = 64
SIDE = functools.partial(errors.positive, most=65536)


# The flags of keys of a config's `data` section.
FLAGS = {
  f'config.data.{key}': key
  for key in (
    'path',
    'split',
    'seed',
    'resize',
    'max_bad',
    'aspect',
    'where',
    'captions',
  )
} | {'config.data.kind': 'source'}


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv, FLAGS)


def _parser() -> errors.Parser:
  parser = errors.Parser(
    prog='imagen-prepare',
    description='Write captioned images as ArrayRecord, resized once, with or '
    "without the text encoder's embeddings. The same command resumes where it "
    'stopped.',
  )
  add = parser.add_argument
  add(
    '--source',
    required=True,
    help='kind of source: folder, webdataset, tfds, arrayrecord, shapes or '
    'emoji',
  )
  add('--path', type=user_path, help="where it is, such as 'shards/*.tar'")
  add(
    '--size',
    type=SIDE,
    required=True,
    help='side of the images in pixels',
  )
  add('--out', type=user_path, required=True, help='folder to write')
  add('--resize', default='area', help='area, bicubic or lanczos')
  add(
    '--aspect',
    default='crop',
    help='crop (the central square), pad (the whole image on a white square) '
    'or buckets (shapes of equal area, for batches of one shape)',
  )
  add(
    '--where',
    nargs='+',
    metavar='CONDITION',
    help="use the images that meet these: 'side>=512' 'aspect<=2' "
    "'caption_words>=3' 'similarity>=0.28' NSFW==UNLIKELY",
  )
  add(
    '--captions',
    nargs='+',
    metavar='COLUMN',
    help='columns of the metadata with captions, all of which are kept',
  )
  add('--split', default='train', choices=('train', 'eval'), help='which part')
  add('--seed', type=int, default=0, help='of shapes and emoji')
  add('--num', type=errors.positive, help='write the first NUM images only')
  add(
    '--max_bad',
    type=float,
    default=0.01,
    help='fraction of bad images or captions above which to stop',
  )
  add(
    '--text',
    type=user_path,
    help="store this text encoder's embeddings: a folder of T5 weights, or "
    'demo',
  )
  add(
    '--max_len',
    type=SIDE,
    help="text positions, which must be the run's text.max_len; the encoder's "
    'own if left out',
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
    help='images in one file; as many as take about 256 MB if left out',
  )
  return parser


def _main(argv: list[str]) -> None:
  args = _parser().parse_args(argv)
  check_folder(args.out, key='out')
  if args.max_len is not None and args.text is None:
    raise UsageError('has no effect without --text.', key='max_len')
  from imagen_jax.data import encoding
  from imagen_jax.data import prepare as preparation
  from imagen_jax.data.checked import summary
  from imagen_jax.data.sources import find_source, make_source

  quality = args.quality or encoding.QUALITY.get(args.encode)
  encode = encoding.Encoding(args.encode, quality)
  if find_source(args.source).endless and args.num is None:
    raise UsageError(
      f'is needed, because source {args.source} is endless.', key='num'
    )
  keys = 'split', 'resize', 'seed', 'aspect', 'where', 'captions'
  settings = {k: getattr(args, k) for k in keys}
  source = make_source(
    kind=args.source,
    size=args.size,
    path=args.path,
    max_bad=args.max_bad,
    **settings,
  )
  text, embed = _embedder(args) if args.text else (None, None)
  settings |= {'source': args.source, 'fingerprint': source.fingerprint}
  header, dropped = preparation.prepare(
    source,
    args.out,
    preparation.Recipe(
      args.size, settings, text, args.num, args.part_size or 0, encode
    ),
    embed=embed,
  )
  size = sum(part['bytes'] for part in header['parts'])
  print(
    f'{args.out}: {header["count"]} images of {args.size} pixels as '
    f'{args.encode}{f" of quality {quality}" if quality else ""}, '
    f'{size / 1e6:.1f} MB in {len(header["parts"])} files'
    + (f', with embeddings of {text["max_len"]} positions' if text else '')
  )
  if dropped:
    print(
      f'{len(dropped)} were left out, listed in '
      f'{pathlib.Path(args.out) / preparation.DROPPED}: {summary(dropped)}'
    )


def _embedder(args: argparse.Namespace) -> tuple[dict[str, Any], 'Embed']:
  """(the header's `text`, function from captions to a list of [n, D])."""
  import ml_dtypes

  from imagen_jax.cli import runtime
  from imagen_jax.data.checked import CLEANING
  from imagen_jax.io import text_folder
  from imagen_jax.text.encoder import load_text_encoder

  runtime.start()
  encoder = load_text_encoder(text_folder.existing(args.text))
  max_len = args.max_len or encoder.max_len
  text = {
    'dim': encoder.dim,
    'max_len': max_len,
    'dtype': 'bfloat16',
    'encoder': encoder.digest,
    'tokenizer': encoder.tokenizer.digest,
    'cleaning': CLEANING,
  }

  def embed(captions: Sequence[str]) -> list['np.ndarray']:
    emb, mask = encoder.encode(captions, max_len=max_len, batch_size=TEXT_BATCH)
    emb = emb.astype(ml_dtypes.bfloat16)
    return [row[: kept.sum()] for row, kept in zip(emb, mask)]

  return text, embed


if __name__ == '__main__':
  sys.exit(main())
