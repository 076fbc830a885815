"""imagen-sample: generates images from prompts."""

import importlib
import importlib.util
import math
import pathlib
import sys

import imagen_jax
from imagen_jax.cli import errors, output, runtime, sampling_flags
from imagen_jax.errors import DataError, ImagenError, UsageError

# Modules for model folders of other layouts, each of which may be absent:
#   add_flags(parser)            adds an argument group of its own flags
#   is_folder(path) -> bool      whether a --model is one of its folders
#   generate(args, prompts) -> (images, records), for `output.write`
FORMATS = ('imagen_jax.deepfloyd.command_line',)
# Flags that are allowed with --from_image.
WITH_FROM_IMAGE = (
  'from_image', 'model', 'out', 'fsdp', 'distributed', 'coordinator',
  'num_processes', 'process_id',
)  # fmt: skip


def main(argv=None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _formats():
  """The modules of `FORMATS` that exist."""
  found = []
  for name in FORMATS:
    package = name.rpartition('.')[0]
    if importlib.util.find_spec(package) and importlib.util.find_spec(name):
      found.append(importlib.import_module(name))
  return found


def _parser(formats):
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
  add('--mask', help='with --init_image: white where to inpaint')
  sampling_flags.add_flags(parser)
  add('--dtype', default='auto', help='auto, float32 or bfloat16')
  add('--batch_size', type=int, help='images at a time; up to 4')
  add('--fsdp', type=int, help='devices that share a network; as needed')
  own = {}  # {module of a format: its flags}
  for module in formats:
    before = {action.dest for action in parser._actions}
    module.add_flags(parser)
    own[module] = {a.dest for a in parser._actions} - before
  runtime.add_process_flags(parser)
  return parser, own


def _main(argv):
  formats = _formats()
  parser, own = _parser(formats)
  args = parser.parse_args(argv)
  given = {k for k, v in vars(args).items() if v != parser.get_default(k)}
  if args.from_image is not None:
    for name in sorted(given.difference(WITH_FROM_IMAGE)):
      raise UsageError(
        'has no effect with --from_image, which repeats the settings in the '
        'image; leave it out.',
        key=name,
      )
    images, records = _repeat(args)
  else:
    prompts = _prompts(args)
    theirs = [m for m in formats if args.model and m.is_folder(args.model)]
    for name in sorted(given):
      if any(name in own[module] for module in set(own).difference(theirs)):
        raise UsageError('has no effect with this --model.', key=name)
    runtime.start(processes=args)
    generate = theirs[0].generate if theirs else _generate
    images, records = generate(args, prompts)
  grid = args.from_image is None
  for path in output.write(args.out, images, records, grid=grid):
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


def _generate(args, prompts):
  """(images, records) of a model folder in the package's own layout."""
  from imagen_jax.cascade import batching

  # Check everything before any work.
  request = batching.Request(
    prompts, args.seed, range(args.num_images), args.batch_size
  )
  cascade = imagen_jax.load(
    args.model,
    dtype=args.dtype,
    stages=sampling_flags.stage_names(args),
    fsdp=args.fsdp,
  )
  choices = sampling_flags.choices(args)
  configs = cascade.settings(**choices)
  images = sampling_flags.open_images(image=args.init_image, mask=args.mask)
  first = cascade.stages[0]
  batching.check_images(
    first.name,
    first.low_resolution is not None,
    low_res=args.low_res,
    strength=choices['strength'],
    **images,
  )
  embedding = cascade.embed(prompts)
  _notes(cascade, embedding)
  generated = cascade.sample(
    embedding,
    seed=args.seed,
    num_images=args.num_images,
    low_res=_low_res(cascade, args.low_res),
    **images,
    batch_size=request.batch,
    callback=output.progress(),
    **choices,
  )
  record = _record(cascade, configs, args) | {'batch_size': request.batch}
  records = [
    record | {'prompt': prompts[p], 'index': i} for p, i in request.rows
  ]
  return list(generated.values())[-1], records


def _low_res(cascade, path):
  """The image at a path for the first stage: uint8 [1, h, w, 3], or None.

  It is cropped so that every stage can upsample it.
  """
  if path is None:
    return None
  first = cascade.stages[0]
  from imagen_jax.io import images as image_io

  unit = 1
  for stage in cascade.stages:
    factor, whole = stage.resolution // first.low_resolution, stage.net.multiple
    unit = math.lcm(unit, whole // math.gcd(whole, factor))
  return image_io.read_low_res(path, first.low_resolution, unit)[None]


def _notes(cascade, embedding):
  """Prints notes on the prompts to stderr, one per line."""
  for prompt, cut in zip(embedding.prompts, embedding.cut):
    if cut:
      short = prompt if len(prompt) <= 40 else prompt[:39] + '…'
      output.note(
        f'{short!r} is too long: its last {cut} tokens were cut, '
        f'{embedding.mask.shape[1]} remain.'
      )
  if any(not prompt.strip() for prompt in embedding.prompts):
    output.note(
      'an empty prompt is unconditional; guidance does nothing there.'
    )
  if len(cascade.data_kinds) == 1:
    from imagen_jax.data.sources import find_source

    try:
      source = find_source(*cascade.data_kinds)
    except (ImagenError, ImportError):
      return  # sampling does not need the training data
    for text in source.prompt_notes(embedding.prompts):
      output.note(text)


def _record(cascade, configs, args):
  """The settings of a call, stored in its PNGs for --from_image."""
  import jax

  settings = {}
  for stage, config in zip(cascade.stages, configs):
    values = {key: getattr(config, key) for key in sampling_flags.PER_STAGE}
    settings[stage.name] = values | {'threshold': config.threshold or 'none'}
  return {
    'seed': args.seed,
    'devices': output.devices(),
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


def _repeat(args):
  """(images, records): generates an image again from its PNG's record."""
  from imagen_jax.io import images as image_io

  record = image_io.read_metadata(args.from_image)
  if 'format' in record:
    raise UsageError(
      f'{args.from_image} was generated with {record["format"]}, which '
      '--from_image does not repeat; give the settings in its metadata as '
      'flags.'
    )
  runtime.start(processes=args)
  try:
    names = list(record['stages'])
    demo = record['model'] == 'demo'
    model = args.model or (None if demo else record['model'])
    cascade = imagen_jax.load(
      model, dtype=record['dtype'], stages=names, fsdp=args.fsdp
    )
    choices = {
      # Images older than a flag have no value for it.
      key: [record['stages'][name].get(key) for name in names]
      for key in sampling_flags.PER_STAGE
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
    output.note(
      f'{args.from_image} was generated with other weights ({digest}, '
      f'here {cascade.digest}); the image will differ.'
    )
  if not record.get('init_image'):
    del choices['strength']  # without effect
  result = cascade.sample(
    [prompt],
    low_res=_low_res(cascade, low_path),
    **sampling_flags.open_images(
      image=record.get('init_image'), mask=record.get('mask')
    ),
    callback=output.progress(),
    **call,
    **choices,
  )
  return list(result.values())[-1], [record | {'devices': output.devices()}]


if __name__ == '__main__':
  sys.exit(main())
