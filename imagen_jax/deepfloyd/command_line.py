"""sample.py with a DeepFloyd IF folder as its --model."""

import pathlib

from imagen_jax.errors import UsageError


def add_flags(parser):
  """The flags that only IF knows."""
  group = parser.add_argument_group(
    'DeepFloyd IF', 'With an IF folder as --model; see the README.'
  )
  add = group.add_argument
  add('--negative_prompt', help='what guidance steers away from')
  add('--style_prompt', help='a second prompt, for the style')
  add('--style_fraction', help='its fraction of the prediction, 0 to 1')
  add('--aspect_ratio', help='such as 3:2; without --init_image')
  add(
    '--clean_caption',
    action='store_true',
    help="clean prompts as IF's training captions were",
  )
  add('--text_cache', help='directory that keeps embeddings of prompts')
  add(
    '--upsample_with',
    help='model folder of a super-resolution stage of our own, as third stage',
  )


def is_folder(path):
  """Whether --model is an IF folder; imports nothing heavy."""
  if path is None:
    return False
  folder = pathlib.Path(path)
  parts = [folder, *(folder.iterdir() if folder.is_dir() else [])]
  return any((part / 'unet' / 'config.json').exists() for part in parts)


ONLY_HERE = (
  'negative_prompt',
  'style_prompt',
  'style_fraction',
  'aspect_ratio',
  'clean_caption',
  'text_cache',
  'upsample_with',
)


def check_unused(args):
  """Refuses IF's flags where the model is none of IF's.

  Raises:
    UsageError: naming the flag.
  """
  for name in ONLY_HERE:
    if getattr(args, name):
      raise UsageError(
        f'--{name} works with a DeepFloyd IF folder as --model only.'
      )


def steps_per_stage(text):
  """'smart50,50' as ['smart50', '50']; a respacing's numbers need ':'.

  '10:10:3:2:2,50' is IF's '10,10,3,2,2' for the first stage.
  """
  if text is None:
    return None
  values = [part.replace(':', ',') for part in text.split(',')]
  return values[0] if len(values) == 1 else values


def generate(args, prompts, *, per_stage, write, progress):
  """Generates what `sample.py`'s arguments ask for.

  Args:
    args: parsed arguments.
    prompts: list of strings.
    per_stage, write, progress: sample.py's own.

  Returns:
    the exit code.
  """
  import jax

  import imagen_jax
  from imagen_jax.cascade import conditioning
  from imagen_jax.deepfloyd import cleaning, images, pipeline
  from imagen_jax.io.images import open_image

  if args.threshold is not None:
    raise UsageError(
      "--threshold is fixed by an IF stage's scheduler_config.json; leave it "
      'out.'
    )
  model = pipeline.load(
    args.model,
    dtype=args.dtype,
    stages=args.stages.split(',') if args.stages else None,
    fsdp=args.fsdp,
  )
  third = _third_stage(args, model)
  choices = {
    'sampler': per_stage('sampler', args.sampler),
    'steps': steps_per_stage(args.steps),
    'guidance': per_stage('guidance', args.guidance),
    'aug_level': per_stage('aug_level', args.aug_level),
    'strength': per_stage('strength', args.strength),
    'mixer': per_stage('style_fraction', args.style_fraction),
  }
  clean = cleaning.cleaner(args.clean_caption)
  cleaned = [clean(prompt) for prompt in prompts]
  opened = {
    name: open_image(path, mode)
    for name, path, mode in (
      ('image', args.init_image, 'RGB'),
      ('mask', args.mask, 'L'),
      ('low_res', args.low_res, 'RGB'),
    )
    if path is not None
  }
  batch = args.batch_size or min(4, len(prompts) * args.num_images)
  style = args.style_prompt
  generated = model.sample(
    cleaned,
    seed=args.seed,
    num_images=args.num_images,
    negative_prompt=clean(args.negative_prompt or ''),
    style_prompt=None if style is None else clean(style),
    aspect=images.parse_aspect(args.aspect_ratio or '1:1'),
    cache=args.text_cache,
    batch_size=batch,
    callback=progress(),
    **opened,
    **choices,
  )
  record = {
    'seed': args.seed,
    'batch_size': batch,
    'devices': f'{len(jax.devices())} {jax.devices()[0].platform}',
    'dtype': model.dtype.name,
    'jax': jax.__version__,
    'model': str(args.model),
    'if_stages': {
      part.name: {k: str(v) for k, v in choices.items() if v is not None}
      for part in model.stages
    },
    'upsample_with': args.upsample_with,
    'version': imagen_jax.__version__,
  }
  records = [
    record | {'prompt': prompt, 'index': i}
    for prompt in prompts
    for i in range(args.num_images)
  ]
  last = conditioning.to_uint8(list(generated.values())[-1])
  if third is not None:
    generated = third.sample(
      prompts,
      seed=args.seed,
      num_images=args.num_images,
      low_res=last,
      batch_size=batch,
      callback=progress(),
    )
    last = list(generated.values())[-1]
  for path in write(pathlib.Path(args.out), last, records):
    print(path)
  return 0


def _third_stage(args, model):
  """What --upsample_with names, checked before sampling, or None."""
  import imagen_jax

  if args.upsample_with is None:
    return None
  third = imagen_jax.load(args.upsample_with, dtype=args.dtype, fsdp=args.fsdp)
  takes, last = third.stages[0].low_resolution, model.stages[-1]
  if takes is None:
    raise UsageError(
      f'--upsample_with names {args.upsample_with}, whose stage '
      f'{third.stages[0].name} generates from text alone; name the folder of a '
      'super-resolution stage.'
    )
  if takes != last.resolution:
    raise UsageError(
      f'{last.name} generates {last.resolution} pixels a side and stage '
      f'{third.stages[0].name} of {args.upsample_with} upsamples {takes}; '
      'choose others with --stages or --upsample_with.'
    )
  return third
