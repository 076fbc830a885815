"""imagen-export: exports a training workdir to a model folder."""

import pathlib
import sys
from collections.abc import Sequence

from imagen_jax.cli import errors
from imagen_jax.io import bucket
from imagen_jax.io.paths import user_path


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _main(argv: list[str]) -> None:
  parser = errors.Parser(
    prog='imagen-export',
    description='Export the model of a training workdir as safetensors and '
    'JSON.',
  )
  parser.add_argument(
    '--workdir', type=user_path, required=True, help='training directory'
  )
  parser.add_argument(
    '--out',
    type=user_path,
    required=True,
    help='directory to write, such as models/mine/base',
  )
  parser.add_argument(
    '--weights', default='ema', choices=['ema', 'raw'], help='which weights'
  )
  parser.add_argument(
    '--ema',
    type=float,
    metavar='LENGTH',
    help='an EMA of this length instead, such as 0.08: from the snapshots of a '
    'run with --config.train.ema_lengths',
  )
  parser.add_argument(
    '--step',
    type=int,
    help='which checkpoint, or snapshot for --ema; the newest if left out',
  )
  parser.add_argument(
    '--dtype',
    default='bfloat16',
    choices=['bfloat16', 'float32'],
    help='of the weights',
  )
  args = parser.parse_args(argv)

  from imagen_jax.cli import runtime

  runtime.start()
  from imagen_jax.training.experiment import Export, find_experiment

  workdir, out = bucket.at(args.workdir), pathlib.Path(args.out)
  request = Export(
    workdir=workdir,
    out=out,
    weights=args.weights,
    ema=args.ema,
    step=args.step,
    dtype=args.dtype,
    command=' '.join(['imagen-export', *argv]),
  )
  print(find_experiment(_kind(workdir)).export(request))


def _kind(workdir: pathlib.Path) -> str:
  """The kind of experiment that a workdir's config names."""
  from imagen_jax.io import model_folder

  if not (workdir / 'config.json').exists():  # `export_stage` says so
    return 'stage'
  return model_folder.load_config(workdir)['config'].get('kind', 'stage')


if __name__ == '__main__':
  sys.exit(main())
