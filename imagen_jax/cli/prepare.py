"""imagen-prepare: writes a source of captioned images, resized, to disk."""

import pathlib
import sys

from imagen_jax.cli import errors
from imagen_jax.errors import UsageError

TEXT_BATCH = 64


def main(argv=None):
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _main(argv):
  parser = errors.Parser(
    prog='imagen-prepare',
    description='Write captioned images as ArrayRecord, resized once, with or '
    "without the text encoder's embeddings. The same command resumes where it "
    'stopped.',
  )
  parser.add_argument(
    '--source',
    required=True,
    help='kind of source: folder, webdataset, tfds, arrayrecord, shapes '
    'or emoji',
  )
  parser.add_argument('--path', help="where it is, such as 'shards/*.tar'")
  parser.add_argument(
    '--size', type=int, required=True, help='side of the images in pixels'
  )
  parser.add_argument('--out', required=True, help='folder to write')
  parser.add_argument(
    '--resize', default='area', help='area, bicubic or lanczos'
  )
  parser.add_argument('--split', default='train', help='train or eval')
  parser.add_argument('--seed', type=int, default=0, help='of shapes and emoji')
  parser.add_argument('--num', type=int, help='write the first NUM images only')
  parser.add_argument(
    '--max_bad',
    type=float,
    default=0.01,
    help='fraction of bad images or captions above which to stop',
  )
  parser.add_argument(
    '--text',
    help="store this text encoder's embeddings: a folder of T5 weights, or "
    'demo',
  )
  parser.add_argument(
    '--max_len',
    type=int,
    help="text positions; must be the run's text.max_len, and is the "
    "encoder's own by default",
  )
  parser.add_argument(
    '--part_size', type=int, default=2048, help='images in one file'
  )
  args = parser.parse_args(argv)
  if args.size < 1 or args.part_size < 1 or (args.num or 1) < 1:
    raise UsageError('--size, --num and --part_size must be 1 or more.')
  return prepare(args)


def prepare(args):
  """Writes the set and prints a summary."""
  from imagen_jax.data import prepare as preparation
  from imagen_jax.data.checked import summary
  from imagen_jax.data.sources import find_source, make_source

  if find_source(args.source).endless and args.num is None:
    raise UsageError(
      f'source {args.source} is endless: say how many with --num.'
    )
  source = make_source(
    kind=args.source,
    size=args.size,
    path=args.path,
    split=args.split,
    seed=args.seed,
    resize=args.resize,
    max_bad=args.max_bad,
  )
  text, embed = _embedder(args) if args.text else (None, None)
  settings = {
    'source': args.source,
    'split': args.split,
    'resize': args.resize,
    'seed': args.seed,
    'fingerprint': source.fingerprint,
  }
  header, dropped = preparation.prepare(
    source,
    args.out,
    preparation.Recipe(args.size, settings, text, args.num, args.part_size),
    embed=embed,
  )
  size = sum(part['bytes'] for part in header['parts'])
  print(
    f'{args.out}: {header["count"]} images of {args.size} pixels, '
    f'{size / 1e6:.1f} MB in {len(header["parts"])} files'
    + (f', with embeddings of {text["max_len"]} positions' if text else '')
  )
  if dropped:
    print(
      f'{len(dropped)} were left out, listed in '
      f'{pathlib.Path(args.out) / preparation.DROPPED}: {summary(dropped)}'
    )
  return 0


def _embedder(args):
  """(the header's `text`, function from captions to a list of [n, D])."""
  import ml_dtypes

  from imagen_jax.cli import runtime
  from imagen_jax.data.checked import CLEANING
  from imagen_jax.io.model_folder import text_folder
  from imagen_jax.text.encoder import load_text_encoder

  runtime.start()
  encoder = load_text_encoder(text_folder(args.text))
  max_len = args.max_len or encoder.max_len
  text = {
    'dim': encoder.dim,
    'max_len': max_len,
    'dtype': 'bfloat16',
    'encoder': encoder.digest,
    'tokenizer': encoder.tokenizer.digest,
    'cleaning': CLEANING,
  }

  def embed(captions):
    emb, mask = encoder.encode(captions, max_len=max_len, batch_size=TEXT_BATCH)
    emb = emb.astype(ml_dtypes.bfloat16)
    return [row[: kept.sum()] for row, kept in zip(emb, mask)]

  return text, embed


if __name__ == '__main__':
  sys.exit(main())
