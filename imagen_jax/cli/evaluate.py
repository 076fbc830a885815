"""imagen-evaluate: how well a model does, in numbers and a report."""

import pathlib
import signal
import sys
import time

import imagen_jax
from imagen_jax.cli import errors, runtime, sampling_flags
from imagen_jax.cli.sampling_flags import per_stage
from imagen_jax.errors import UsageError

# Nothing here starts from an image, which `strength` is about.
PER_STAGE = tuple(k for k in sampling_flags.PER_STAGE if k != 'strength')

SUITES = ('shapes', 'prompts', 'clip', 'fid')


def main(argv=None):
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _parser():
  parser = errors.Parser(
    prog='evaluate.py',
    description='Score a model. A run that was interrupted continues when the '
    'same command is given again.',
    argument_default=None,
  )
  add = parser.add_argument
  add('--suite', default='shapes', choices=SUITES, help='what to measure')
  add('--model', help='model folder; the demo that comes with the package')
  add('--out', default='report', help='folder of scores.json and index.html')
  add(
    '--num',
    type=int,
    help='prompts: 300 of each category in shapes, all of '
    'each category of a file, 30000 captions in fid',
  )
  add('--categories', help='of these alone, such as pair,count')
  add('--seed', type=int, default=0, help='of the images')
  add('--stages', help='names of stages, such as base,sr1; all of them')
  add(
    '--from_truth',
    action='store_true',
    help='shapes: give the super-resolution stages true small images',
  )
  add(
    '--sweep',
    action='append',
    default=[],
    metavar='KEY=A,B,…',
    help='one run for each value, such as guidance=1,2,4 or sr1.steps=4,8; '
    'several sweeps make all combinations',
  )
  add('--prompts', help='prompts, clip: .csv, .tsv, .jsonl or .txt file')
  add('--num_images', type=int, default=1, help='prompts, clip: per prompt')
  add('--data', help='fid: a folder of real images with captions')
  add('--source', default='folder', help='fid: what --data is, as in prepare')
  add('--inception', help='fid: InceptionV3 weights, .safetensors or .npz')
  add('--clip', help='clip, fid: a CLIP folder in Hugging Face layout')
  sampling_flags.add_flags(parser, PER_STAGE)
  add('--dtype', default='auto', help='auto, float32 or bfloat16')
  add('--batch_size', type=int, help='images at a time; 4, or 32 on a GPU')
  add(
    '--shard',
    help='i/n: generate fraction i of n; the process number if left out',
  )
  runtime.add_process_flags(parser)
  return parser


def _main(argv):
  args = _parser().parse_args(argv)
  _check(args)
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    return _evaluate(args)
  finally:
    signal.signal(signal.SIGTERM, before)


def _evaluate(args):
  runtime.start(processes=args)
  import jax

  cascade = imagen_jax.load(
    args.model,
    dtype=args.dtype,
    stages=_stages(args),
    devices=jax.local_devices(),  # every process has images of its own
  )
  fraction, batch = _fraction(args.shard), args.batch_size or _default_batch()
  runs = _runs(cascade, args)
  from imagen_jax.evaluation import suites

  suite = suites.make(args, cascade.stages[-1].resolution)
  items = suite.items()
  out, finished = pathlib.Path(args.out), True
  for name, choices in runs:
    folder = out / suite.label / (name or 'run')
    finished &= _run(
      cascade, suite, items, folder, name, choices, args, fraction, batch
    )
  if not finished:
    return 0
  from imagen_jax.evaluation import report

  print(report.write(out))
  return 0


def _check(args):
  if args.num is not None and args.num < 1:
    raise UsageError(f'--num is {args.num}; score at least 1 prompt.')
  if args.batch_size is not None and args.batch_size < 1:
    raise UsageError(f'--batch_size is {args.batch_size}; it is at least 1.')
  if args.num_images < 1:
    raise UsageError(f'--num_images is {args.num_images}; generate at least 1.')
  if args.from_truth and args.suite != 'shapes':
    raise UsageError(
      f'--from_truth needs --suite shapes: suite {args.suite} has no true '
      'images.'
    )


def _stages(args):
  """Names of the stages to load; with --from_truth those above the base."""
  if args.stages:
    return args.stages.split(',')
  if not args.from_truth:
    return None
  from imagen_jax.io import model_folder

  path = args.model or model_folder.demo_path()
  records = model_folder.find_stages(path)
  names = [r.name for r in records if r.low_resolution is not None]
  if not names:
    raise UsageError(
      f'--from_truth needs a super-resolution stage, and {path} has none.'
    )
  return names


def _fraction(text):
  """'1/4' as (1, 4); by default jax's process number and count."""
  if text is None:
    import jax

    return jax.process_index(), jax.process_count()
  try:
    i, n = map(int, text.split('/'))
    if not 0 <= i < n:
      raise ValueError
  except ValueError:
    raise UsageError(
      f'--shard {text} is not understood; give i/n with 0 ≤ i < n, such as 0/4.'
    ) from None
  return i, n


def _default_batch():
  import jax

  return 4 if jax.default_backend() == 'cpu' else 32


def _runs(cascade, args):
  """[(name, choices)]: one run, or one for each combination of the sweeps."""
  choices = sampling_flags.choices(args, PER_STAGE)
  settings = cascade.settings(**choices)  # refuse bad ones before any work
  full = {
    key: [
      'none' if getattr(s, key) is None else getattr(s, key) for s in settings
    ]
    for key in PER_STAGE
  }
  runs = [('', full)]
  for sweep in args.sweep:
    target, _, text = sweep.partition('=')
    stage, _, key = target.rpartition('.')
    names = [s.name for s in cascade.stages]
    if key not in PER_STAGE or not text:
      raise UsageError(
        f'--sweep {sweep} is not understood; give KEY=A,B with KEY one of '
        f'{", ".join(PER_STAGE)}, or STAGE.KEY.'
      )
    if stage and stage not in names:
      raise UsageError(
        f'--sweep {sweep}: there is no stage {stage!r}; the stages are '
        f'{", ".join(names)}.'
      )
    runs = [
      (
        f'{before}{"," if before else ""}{target}={part}',
        chosen
        | {
          key: [
            per_stage(key, part) if stage in ('', name) else old
            for name, old in zip(names, chosen[key])
          ]
        },
      )
      for before, chosen in runs
      for part in text.split(',')
    ]
  for _, chosen in runs:
    cascade.settings(**chosen)
  return runs


def _run(cascade, suite, items, folder, name, choices, args, fraction, batch):
  """One run: generates, scores, and says whether all fractions are finished."""
  from imagen_jax.evaluation import generation, scores

  resolution = cascade.stages[-1].resolution
  stages = {
    stage.name: {key: values[i] for key, values in choices.items()}
    for i, stage in enumerate(cascade.stages)
  }
  generation.open_run(
    folder,
    {
      'suite': suite.label,
      'model_digest': cascade.digest,
      'stages': stages,
      'seed': args.seed,
      'dtype': cascade.dtype.name,
      'prompts': suite.digest(),
    },
  )
  low_res = None
  if args.from_truth:
    small = cascade.stages[0].low_resolution
    if small is None:
      raise UsageError(
        f'--from_truth: stage {cascade.stages[0].name} generates from '
        'text alone; leave it out of --stages.'
      )
    low_res = lambda item: suite.true_image(item, small)
  for note in suite.notes(resolution):
    print(f'note: {note}', file=sys.stderr)
  label = f'{suite.label}@{name}' if name else suite.label
  try:
    generation.generate(
      cascade,
      folder,
      items,
      seed=args.seed,
      batch_size=batch,
      fraction=fraction,
      low_res=low_res,
      judge=suite.judge,
      progress=_progress(label),
      **choices,
    )
  except (KeyboardInterrupt, SystemExit):
    print(
      f'{folder} is kept: give the same command again to continue.',
      file=sys.stderr,
    )
    raise
  records = generation.read_records(folder)
  left = sum((x.category, x.number) not in records for x in items)
  if left:
    print(
      f'{label}: {left} images are left for other processes; the last to '
      'finish writes the scores.'
    )
    return False
  extra = suite.score(folder, records)
  provenance = {
    'run': str(folder.relative_to(args.out)),
    'model': str(args.model) if args.model else 'demo',
    'model_digest': cascade.digest,
    'resolution': resolution,
    'stages': stages,
    'seed': args.seed,
    'num': suite.num,
    'batch_size': batch,
    'dtype': cascade.dtype.name,
    'device': _device(),
    'version': imagen_jax.__version__,
    'date': time.strftime('%Y-%m-%d'),
    **suite.provenance(),
  }
  for key, value in extra.items():
    scores.add_scores(
      args.out, key + (f'@{name}' if name else ''), value, provenance
    )
  _print(label, extra[suite.label])
  return True


def _device():
  import jax

  return f'{jax.local_device_count()} {jax.devices()[0].device_kind}'


def _progress(label):
  start = time.monotonic()

  def show(done, total):
    each = (time.monotonic() - start) / done
    print(
      f'{label}: {done}/{total} generated, {each:.2f} s an image, '
      f'{each * (total - done) / 60:.0f} min left',
      file=sys.stderr,
      flush=True,
    )

  return show


def _print(label, categories):
  print(label)
  for category, score in categories.items():
    if 'accuracy' in score:
      low, high = score['ci95']
      print(
        f'  {category:<20}{100 * score["accuracy"]:6.1f} %  '
        f'({100 * low:.1f} to {100 * high:.1f}), n = {score["n"]}'
      )
    else:
      told = ', '.join(f'{k} {_number(v)}' for k, v in score.items())
      print(f'  {category:<20}{told}')


def _number(value):
  if isinstance(value, list):
    return f'({_number(value[0])} to {_number(value[1])})'
  return f'{value:.4g}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
  sys.exit(main())
