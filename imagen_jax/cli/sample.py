"""imagen-sample: images from prompts, from the command line."""

import math
import pathlib
import re
import sys

import imagen_jax
from imagen_jax.cli import errors, runtime
from imagen_jax.deepfloyd import command_line as deepfloyd
from imagen_jax.errors import DataError, UsageError

PER_STAGE = {
  'sampler': str,
  'steps': int,
  'guidance': float,
  'aug_level': float,
  'strength': float,
  'threshold': str,
}


def main(argv=None):
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _parser():
  parser = errors.Parser(
    prog='sample.py',
    description='Generate images from prompts. Lists such as --steps 32,16,8 '
    'have one value per stage.',
    argument_default=None,
  )
  add = parser.add_argument
  source = parser.add_mutually_exclusive_group()
  source.add_argument('--prompt', help='what to generate; empty: anything')
  source.add_argument('--prompts', help='a text file, one prompt a line')
  source.add_argument('--from_image', help='generate a PNG of ours once more')
  add('--num_images', type=int, default=1, help='images per prompt')
  add('--seed', type=int, default=0)
  add('--out', default='out', help='directory; nothing in it is overwritten')
  add('--model', help='model folder; the demo that comes with the package')
  add('--stages', help='names of stages, such as base,sr1; all of them')
  add('--low_res', help='an image for the first of --stages to upsample')
  add('--init_image', help='an image to start from')
  add('--strength', help='fraction of the way back to noise, above 0, up to 1')
  add('--mask', help='with --init_image: white where to inpaint')
  add('--sampler', help='ddpm, ddim or dpmpp')
  add('--steps', help='network evaluations')
  add('--guidance', help='w in w·cond + (1−w)·uncond; 1 is none')
  add('--aug_level', help='noise on the low-resolution input, 0 to 1')
  add('--threshold', help='dynamic, static or none')
  add('--dtype', default='auto', help='auto, float32 or bfloat16')
  add('--batch_size', type=int, help='images at a time; up to 4')
  add('--fsdp', type=int, help='devices that share a network; as needed')
  deepfloyd.add_flags(parser)
  runtime.add_process_flags(parser)
  return parser


def _main(argv):
  args = _parser().parse_args(argv)
  if args.from_image is not None:
    return _again(args)
  prompts = _prompts(args)
  if args.num_images < 1:
    raise UsageError(f'--num_images is {args.num_images}; generate at least 1.')
  _check_batch_size(args.batch_size)

  runtime.start(processes=args)
  if deepfloyd.is_folder(args.model):
    return deepfloyd.generate(
      args, prompts, per_stage=per_stage, write=_write, progress=_progress
    )
  deepfloyd.check_unused(args)
  cascade = imagen_jax.load(
    args.model,
    dtype=args.dtype,
    stages=args.stages.split(',') if args.stages else None,
    fsdp=args.fsdp,
  )
  choices = {k: per_stage(k, getattr(args, k)) for k in PER_STAGE}
  low_res = _low_res(cascade, args.low_res)
  cascade.settings(**choices)  # refuse bad ones before any work
  embedding = cascade.embed(prompts)
  _notes(cascade, embedding)
  batch = args.batch_size or min(4, len(prompts) * args.num_images)
  images = cascade.sample(
    embedding,
    seed=args.seed,
    num_images=args.num_images,
    low_res=low_res,
    **_images(args.init_image, args.mask),
    batch_size=batch,
    callback=_progress(),
    **choices,
  )
  generated = [(p, i) for p in prompts for i in range(args.num_images)]
  records = [
    _record(cascade, args, choices, prompt, i, batch) for prompt, i in generated
  ]
  paths = _write(pathlib.Path(args.out), list(images.values())[-1], records)
  for path in paths:
    print(path)
  return 0


def _prompts(args):
  if args.prompts is not None:
    try:
      text = pathlib.Path(args.prompts).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
      raise DataError(
        f'--prompts {args.prompts} cannot be read ({error}); give a UTF-8 '
        'text file with one prompt a line.'
      ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
      raise DataError(f'--prompts {args.prompts} holds no prompt.')
    return prompts
  if args.prompt is None:
    raise UsageError(
      'nothing to generate: add --prompt "a red circle above a blue square".'
    )
  return [args.prompt]


def _check_batch_size(batch_size):
  if batch_size is not None and batch_size < 1:
    raise UsageError(f'--batch_size is {batch_size}; it is at least 1.')


def per_stage(name, text):
  """'32,16,8' as [32, 16, 8], '32' as 32; None stays."""
  if text is None:
    return None
  kind = PER_STAGE.get(name, float)
  try:
    values = [kind(part) for part in text.split(',')]
  except ValueError as error:
    what = 'whole numbers' if kind is int else 'numbers'
    raise UsageError(
      f'--{name} {text} is not understood; give {what} such as '
      f'--{name} {"32,16,8" if kind is int else "3,2,1"}.'
    ) from error
  return values[0] if len(values) == 1 else values


def _low_res(cascade, path):
  if path is None:
    return None
  from imagen_jax.cascade.stage import multiple
  from imagen_jax.io import images as image_io

  first = cascade.stages[0]
  if first.low_resolution is None:
    raise UsageError(
      f'--low_res needs a super-resolution stage first; {first.name} generates '
      'from text alone: add --stages with a later one.'
    )
  unit = 1
  for stage in cascade.stages:
    factor, whole = stage.resolution // first.low_resolution, multiple(stage)
    unit = math.lcm(unit, whole // math.gcd(whole, factor))
  return image_io.read_low_res(path, first.low_resolution, unit)[None]


def _images(image, mask):
  """{'image', 'mask'} as PIL images, of those that are given."""
  from imagen_jax.io.images import open_image

  given = (('image', image, 'RGB'), ('mask', mask, 'L'))
  return {name: open_image(p, mode) for name, p, mode in given if p}


def _notes(cascade, embedding):
  """What the user should know of the prompts, a line each, on stderr."""
  for prompt, cut in zip(embedding.prompts, embedding.cut):
    if cut:
      print(
        f'note: {_short(prompt)!r} is too long: its last {cut} tokens were '
        f'cut, {embedding.mask.shape[1]} remain.',
        file=sys.stderr,
      )
  if any(not prompt.strip() for prompt in embedding.prompts):
    print(
      'note: an empty prompt is unconditional; guidance does nothing there.',
      file=sys.stderr,
    )
  if cascade.trained_on_shapes:
    from imagen_jax.worlds import captions

    known = captions.vocabulary()
    unknown = {
      word: None
      for prompt in embedding.prompts
      for word in captions.words(prompt)
      if word not in known
    }
    if unknown:
      print(
        f'note: the demo model never learned {", ".join(unknown)}. '
        f'{captions.describe()}',
        file=sys.stderr,
      )


def _short(text, length=40):
  return text if len(text) <= length else text[: length - 1] + '…'


def _progress():
  """Overwrites one line on a terminal, prints a line per stage otherwise."""
  terminal = sys.stderr.isatty()

  def show(stage, done, total):
    if terminal:
      end = '\n' if done == total else ''
      print(f'\r{stage}: {done}/{total}', end=end, file=sys.stderr, flush=True)
    elif done == total:
      print(f'{stage}: {total} generated', file=sys.stderr)

  return show


def _record(cascade, args, choices, prompt, i, batch):
  """Everything that made an image, for its PNG and for --from_image."""
  import jax

  settings = {}
  for stage, setting in zip(cascade.stages, cascade.settings(**choices)):
    settings[stage.name] = {
      'sampler': setting.sampler,
      'steps': setting.steps,
      'guidance': setting.guidance,
      'aug_level': setting.aug_level,
      'strength': setting.strength,
      'threshold': setting.threshold or 'none',
    }
  return {
    'prompt': prompt,
    'seed': args.seed,
    'index': i,
    'batch_size': batch,
    'devices': f'{len(jax.devices())} {jax.devices()[0].platform}',
    'dtype': cascade.dtype.name,
    'jax': jax.__version__,
    'model': str(args.model) if args.model else 'demo',
    'model_digest': cascade.digest,
    'low_res': args.low_res,
    'init_image': args.init_image,
    'mask': args.mask,
    'stages': settings,
    'version': imagen_jax.__version__,
  }


def _again(args):
  """Generates the image that a PNG's record describes."""
  from imagen_jax.io import images as image_io

  record = image_io.read_metadata(args.from_image)
  if 'if_stages' in record:
    raise UsageError(
      f'{args.from_image} was generated with DeepFloyd IF, which --from_image '
      'does not repeat; give the settings in its metadata as flags.'
    )
  runtime.start(processes=args)
  try:
    names = list(record['stages'])
    model = args.model or (
      None if record['model'] == 'demo' else record['model']
    )
    cascade = imagen_jax.load(model, dtype=record['dtype'], stages=names)
    choices = {
      # Images of before --strength say nothing of it.
      key: [record['stages'][name].get(key) for name in names]
      for key in PER_STAGE
    }
    digest, low_path = record['model_digest'], record['low_res']
    call = {
      'seed': record['seed'],
      'indices': [record['index']],
      'batch_size': record['batch_size'],
    }
    prompt = record['prompt']
  except (KeyError, TypeError, AttributeError) as error:
    raise DataError(
      f'{args.from_image} carries a record that lacks {error}; it was written '
      'by another version, or changed since.'
    ) from error
  if cascade.digest != digest:
    print(
      f'note: {args.from_image} was generated with other weights ({digest}, '
      f'here {cascade.digest}); the image will differ.',
      file=sys.stderr,
    )
  result = cascade.sample(
    [prompt],
    low_res=_low_res(cascade, low_path),
    **_images(record.get('init_image'), record.get('mask')),
    callback=_progress(),
    **call,
    **choices,
  )
  images = list(result.values())[-1]
  record['devices'] = None
  for path in _write(pathlib.Path(args.out), images, [record], grid=False):
    print(path)
  return 0


def _write(out, images, records, grid=True):
  """Numbers on from what is there: 000_a-red-circle.png, grid_000.png.

  Of several processes, which all hold the images, the first one writes.
  """
  import jax

  from imagen_jax.io import images as image_io

  if jax.process_index() != 0:
    return []

  try:
    out.mkdir(parents=True, exist_ok=True)
  except FileExistsError as error:
    raise UsageError(f'--out {out} is a file; give a directory.') from error
  names = [p.name for p in out.iterdir()]
  first = 1 + max(
    [int(m[1]) for m in map(re.compile(r'(\d+)_.*\.png$').match, names) if m],
    default=-1,
  )
  paths = []
  for n, (image, record) in enumerate(zip(images, records), first):
    path = out / f'{n:03d}_{_slug(record["prompt"])}.png'
    image_io.save_png(path, image, record)
    paths.append(path)
  if grid:
    number = 1 + max(
      [int(m[1]) for m in map(re.compile(r'grid_(\d+)').match, names) if m],
      default=-1,
    )
    path = out / f'grid_{number:03d}.png'
    per_prompt = len({record['prompt'] for record in records})
    columns = len(records) // per_prompt if per_prompt > 1 else None
    if columns == 1:
      columns = None
    image_io.save_png(
      path, image_io.grid(image_io.upsample(images, 256), columns)
    )
    paths.append(path)
  return paths


def _slug(prompt):
  slug = re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')
  return slug[:48].rstrip('-') or 'unconditional'


if __name__ == '__main__':
  sys.exit(main())
