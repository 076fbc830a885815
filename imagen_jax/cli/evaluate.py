"""imagen-evaluate: scores a model and writes a report."""

import argparse
import dataclasses
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from imagen_jax.cli import errors, runtime, sampling_flags
from imagen_jax.cli.sampling_flags import names
from imagen_jax.errors import UsageError
from imagen_jax.evaluation.config import SAMPLING, EvalConfig
from imagen_jax.evaluation.listener import Listener
from imagen_jax.evaluation.scores import Categories
from imagen_jax.io import bucket
from imagen_jax.io.paths import user_path


def _shard(text: str) -> tuple[int, int]:
  """'1/4' as (1, 4)."""
  try:
    i, n = map(int, text.split('/'))
  except ValueError:
    raise UsageError(
      f'{text!r} is not understood; give i/n, such as 0/4.', key='shard'
    ) from None
  return i, n


# {a setting of `EvalConfig`, also a flag: (its type, what it is)}
FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
  'suite': (
    str,
    'what to measure: prompts, clip, fid, or a data kind with a suite of its '
    'own, such as shapes; if left out, the kind that the model was trained on',
  ),
  'model': (
    user_path,
    'model folder, or the name of a bundled one; demo if left out',
  ),
  'out': (
    user_path,
    'folder of scores.json, index.html, and images and section.json of each '
    'run',
  ),
  'num': (
    int,
    'prompts; if left out, 300 of each category in shapes, all of each '
    'category of a file, 30000 captions in fid',
  ),
  'weak_model': (
    user_path,
    'folder of weaker models of the stages, for --autoguidance',
  ),
  'negative_prompt': (str, 'what guidance steers away from, for every prompt'),
  'categories': (names, 'score these only, such as pair,count'),
  'seed': (int, 'of the images'),
  'stages': (names, 'names of stages, such as base,sr1; all if left out'),
  'dtype': (str, 'auto, float32 or bfloat16'),
  'batch_size': (
    int,
    'images at a time; 4, or 32 on an accelerator, if left out',
  ),
  'shard': (
    _shard,
    'i/n: generate fraction i of n; the process number if left out',
  ),
}
# The same of those that only some suites use.
OF_SUITES: dict[str, tuple[Callable[[str], Any], str]] = {
  'prompts': (user_path, 'prompts, clip: .csv, .tsv, .jsonl or .txt file'),
  'num_images': (int, 'prompts, clip: images per prompt'),
  'data': (
    user_path,
    'fid: real images with captions; icons: the folder of the packages',
  ),
  'source': (str, 'fid: the data kind of --data, as in imagen-prepare'),
  'inception': (user_path, 'fid: InceptionV3 weights, .safetensors or .npz'),
  'fid_mode': (
    str,
    'fid: resize images for Inception as the package clean-fid (clean) or '
    'pytorch-fid does',
  ),
  'efficientnet': (
    user_path,
    'fid, icons: EfficientNet-Lite0 weights, .safetensors',
  ),
  'clip': (user_path, 'clip, fid: a CLIP folder in Hugging Face layout'),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  flags = {'config.data.kind': 'source', 'config.data.path': 'data'}
  return errors.run(_main, argv, flags)


def _parser() -> errors.Parser:
  parser = errors.Parser(
    prog='evaluate.py',
    description='Score a model. An interrupted run resumes when the same '
    'command is given again.',
  )
  suites = parser.add_argument_group('the suites prompts, clip and fid')
  for group, flags in (parser, FLAGS), (suites, OF_SUITES):
    for name, (kind, text) in flags.items():
      default = getattr(EvalConfig, name)
      group.add_argument(f'--{name}', type=kind, default=default, help=text)
  parser.add_argument(
    '--follow',
    type=user_path,
    metavar='WORKDIR',
    help='score the checkpoints of a training as they appear, until it ends; '
    '--out is then WORKDIR/scores if left out',
  )
  parser.add_argument(
    '--from_truth',
    action='store_true',
    help='give the super-resolution stages true low-resolution images',
  )
  parser.add_argument(
    '--sweep',
    action='append',
    default=[],
    metavar='KEY=A,B,…',
    help='one run for each value, such as guidance=1,2,4 or sr1.steps=4,8; '
    'several sweeps make all combinations',
  )
  sampling_flags.add_flags(parser, SAMPLING)
  runtime.add_process_flags(parser)
  return parser


def _main(argv: list[str]) -> None:
  parser = _parser()
  args = parser.parse_args(argv)
  if args.follow is not None:
    _check_follow(args, parser.given(argv))
  config = _config(args)
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    runtime.start(processes=args)
    if args.follow is not None:
      from imagen_jax.cli.follow import follow

      follow(bucket.at(args.follow, key='follow'), config, _Console())
      return
    from imagen_jax.evaluation import run

    result = run.evaluate(config, _Console())
  except (KeyboardInterrupt, SystemExit):
    if pathlib.Path(config.out).exists():
      print(
        f'{config.out} is kept: give the same command again to resume.',
        file=sys.stderr,
      )
    raise
  finally:
    signal.signal(signal.SIGTERM, before)
  if result.report:
    print(result.report)


def _check_follow(args: argparse.Namespace, given: set[str]) -> None:
  """Sets --out for --follow; refuses flags that contradict it."""
  for flag in ('model', 'shard', 'distributed', 'coordinator'):
    if flag in given:
      raise UsageError(
        f'has no effect with --follow, by which one process scores the '
        f'checkpoints of {args.follow}; leave it out.',
        key=flag,
      )
  if 'out' not in given:
    if bucket.is_bucket(args.follow):
      raise UsageError(
        'is needed for a run in a bucket: a folder here, for the scores.',
        key='out',
      )
    args.out = str(pathlib.Path(args.follow) / 'scores')


def _config(args: argparse.Namespace) -> EvalConfig:
  """The `EvalConfig` that the flags ask for."""
  given = vars(args) | {
    'sweep': _sweep(args.sweep),
    'sampling': {
      key: value
      for key, value in sampling_flags.choices(args, SAMPLING).items()
      if value is not None
    },
  }
  fields = dataclasses.fields(EvalConfig)
  return EvalConfig(**{field.name: given[field.name] for field in fields})


def _sweep(texts: Sequence[str]) -> dict[str, tuple]:
  """['sr1.steps=4,8'] as {'sr1.steps': (4, 8)}."""
  sweep: dict[str, tuple] = {}
  for text in texts:
    target, _, values = text.partition('=')
    if not values or target in sweep:
      raise UsageError(
        f'{text!r} is not understood, or given twice; give KEY=A,B with KEY '
        f'one of {", ".join(SAMPLING)}, or STAGE.KEY.',
        key='sweep',
      )
    key = target.rpartition('.')[2]
    sweep[target] = tuple(
      sampling_flags.per_stage(key, value) for value in values.split(',')
    )
  return sweep


class _Console(Listener):
  """Prints progress to stderr and scores to stdout."""

  start = 0.0

  def progress(self, label: str, done: int, total: int) -> None:
    if not done:
      self.start = time.monotonic()
      return
    each = (time.monotonic() - self.start) / done
    print(
      f'{label}: {done}/{total} generated, {each:.2f} s per image, '
      f'{each * (total - done) / 60:.0f} min left',
      file=sys.stderr,
      flush=True,
    )

  def left(self, label: str, count: int) -> None:
    print(
      f'{label}: {count} images are left for other processes; the last to '
      'finish writes the scores.'
    )

  def scored(self, label: str, categories: Categories) -> None:
    print(label)
    for category, score in categories.items():
      if 'accuracy' in score:
        low, high = score['ci95']
        own = score.get('judge')
        beside = '' if own is None else f', true images {100 * own:.1f} %'
        print(
          f'  {category:<20}{100 * score["accuracy"]:6.1f} %  '
          f'({100 * low:.1f} to {100 * high:.1f}), n = {score["n"]}{beside}'
        )
      else:
        values = ', '.join(f'{k} {_number(v)}' for k, v in score.items())
        print(f'  {category:<20}{values}')


def _number(value: Any) -> str:
  if isinstance(value, list):
    return f'({_number(value[0])} to {_number(value[1])})'
  return f'{value:.4g}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
  sys.exit(main())
