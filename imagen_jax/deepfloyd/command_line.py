"""sample.py with a DeepFloyd IF folder as its --model."""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from imagen_jax.cli import input_images, output, sampling_flags
from imagen_jax.errors import UsageError
from imagen_jax.io.paths import user_path

if TYPE_CHECKING:
  from imagen_jax.cascade.cascade import Cascade
  from imagen_jax.deepfloyd.pipeline import IF

# Settings with one value per stage; `steps` are parsed separately.
SAMPLING = (
  'sampler', 'guidance', 'aug_level', 'strength', 'style_fraction', 'grid',
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that apply to IF only."""
  group = parser.add_argument_group(
    'DeepFloyd IF', 'With an IF folder as --model; see the README.'
  )
  add = group.add_argument
  add('--style_prompt', help='a second prompt, for the style')
  add('--style_fraction', help='its fraction of the prediction, 0 to 1')
  add('--aspect_ratio', help='such as 3:2; without --init_image')
  add(
    '--clean_caption',
    action='store_true',
    help="clean prompts as IF's training captions were",
  )
  add(
    '--text_cache',
    type=user_path,
    help='directory that keeps embeddings of prompts',
  )
  add(
    '--upsample_with',
    type=user_path,
    help='model folder of a super-resolution stage of our own, as third stage',
  )


def is_folder(path: str | pathlib.Path) -> bool:
  """Whether --model is an IF folder; imports nothing heavy."""
  folder = pathlib.Path(path)
  parts = [folder, *(folder.iterdir() if folder.is_dir() else [])]
  return any((part / 'unet' / 'config.json').exists() for part in parts)


def steps_per_stage(text: str | None) -> str | list[str] | None:
  """Parses --steps: 'smart50,50' -> ['smart50', '50'].

  The counts of a respacing are separated by ':'. '10:10:3:2:2,50' is IF's
  '10,10,3,2,2' for the first stage and 50 steps for the second.
  """
  if text is None:
    return None
  values = [part.replace(':', ',') for part in text.split(',')]
  return values[0] if len(values) == 1 else values


def generate(
  args: argparse.Namespace, prompts: Sequence[str], out: output.Output
) -> None:
  """Samples as `sample.py`'s arguments say.

  Raises:
    UsageError: a flag is invalid or has no effect.
  """
  from imagen_jax.cascade import conditioning
  from imagen_jax.cascade.batching import Request
  from imagen_jax.deepfloyd import cleaning, images, pipeline

  _check_flags(args)
  request = Request(prompts, args.seed, range(args.num_images), args.batch_size)
  model = pipeline.load(
    args.model,
    dtype=args.dtype,
    stages=args.stages,
    fsdp=args.fsdp,
    cache=args.text_cache,
  )
  third = _third_stage(args, model)
  choices = sampling_flags.choices(args, SAMPLING)
  choices['steps'] = steps_per_stage(args.steps)
  clean = cleaning.cleaner(args.clean_caption)
  style = args.style_prompt
  again = {
    'seed': args.seed,
    'num_images': args.num_images,
    'batch_size': request.batch,
  }
  given: dict[str, Any] = input_images.open_images(
    image=args.init_image, mask=args.mask, low_res=args.low_res
  )
  for name, path in ('image', args.init_image), ('low_res', args.low_res):
    if name in given:
      shape = model.shape_for(**{name: given[name]})
      input_images.note_crop(path, given[name].size, *shape)
  record = _record(args, model, choices) | {'batch_size': request.batch}
  finished = out.of(request.records(record))
  generated = model.sample(
    [clean(prompt) for prompt in prompts],
    negative_prompt=clean(args.negative_prompt or ''),
    style_prompt=None if style is None else clean(style),
    aspect=images.parse_aspect(args.aspect_ratio or '1:1'),
    callback=output.progress(),
    finished=finished if third is None else None,
    **given,
    **again,
    **choices,
  )
  if third is not None:
    third.sample(
      prompts,
      low_res=conditioning.to_uint8(list(generated.values())[-1]),
      callback=output.progress(),
      finished=finished,
      **again,
    )


def _check_flags(args: argparse.Namespace) -> None:
  """Refuses flags that IF does not support or that have no effect here."""
  ours = {*sampling_flags.PER_STAGE, 'weak_model'}
  for name in sorted(ours.difference(SAMPLING, ('steps',))):
    if getattr(args, name) is not None:
      raise UsageError(
        'has no effect with IF, whose scheduler_config.json fixes the '
        'thresholding and whose guidance has a weight only; leave it out.',
        key=name,
      )
  if args.aspect_ratio and (args.init_image or args.low_res):
    raise UsageError(
      "has no effect: the image's own shape is kept; leave it out.",
      key='aspect_ratio',
    )


def _record(
  args: argparse.Namespace, model: 'IF', choices: Mapping[str, Any]
) -> dict[str, Any]:
  """The metadata of a call's images, for their PNGs."""
  import jax

  import imagen_jax

  settings = {k: str(v) for k, v in choices.items() if v is not None}
  return {
    'format': 'DeepFloyd IF',
    'seed': args.seed,
    'devices': output.devices(),
    'dtype': model.dtype.name,
    'jax': jax.__version__,
    'model': str(args.model),
    'stages': {part.name: settings for part in model.stages},
    'negative_prompt': args.negative_prompt,
    'style_prompt': args.style_prompt,
    'upsample_with': args.upsample_with,
    'version': imagen_jax.__version__,
  }


def _third_stage(args: argparse.Namespace, model: 'IF') -> 'Cascade | None':
  """The model of --upsample_with, checked before sampling, or None."""
  import imagen_jax

  if args.upsample_with is None:
    return None
  third = imagen_jax.load(args.upsample_with, dtype=args.dtype, fsdp=args.fsdp)
  takes, last = third.stages[0].low_resolution, model.stages[-1]
  if takes is None:
    raise UsageError(
      f'stage {third.stages[0].name} of {args.upsample_with} generates from '
      'text alone; name the folder of a super-resolution stage.',
      key='upsample_with',
    )
  if takes != last.resolution:
    raise UsageError(
      f'{last.name} generates {last.resolution} pixels a side and stage '
      f'{third.stages[0].name} of {args.upsample_with} upsamples {takes}; '
      'choose another, or other --stages.',
      key='upsample_with',
    )
  return third
