"""imagen-sample: generates images from prompts."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import imagen_jax
from imagen_jax.cli import (
  errors,
  from_image,
  input_images,
  output,
  runtime,
  sampling_flags,
)
from imagen_jax.errors import DataError, ImagenError, UsageError
from imagen_jax.io import files
from imagen_jax.io.paths import user_path

if TYPE_CHECKING:
  from imagen_jax.cascade.cascade import Cascade
  from imagen_jax.cascade.stage import SamplingConfig

# Modules for model folders of other layouts, each of which may be absent:
#   add_flags(parser)            adds an argument group of its own flags
#   is_folder(path) -> bool      whether a --model is one of its folders
#   generate(args, prompts, out)   writes the images to an `output.Output`
FORMATS = ('imagen_jax.deepfloyd.command_line',)
# Flags that are allowed with --from_image.
WITH_FROM_IMAGE = (
  'from_image', 'model', 'weak_model', 'out', 'fsdp', 'distributed',
  'coordinator', 'num_processes', 'process_id',
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _formats() -> list[ModuleType]:
  """The modules of `FORMATS` that exist."""
  found = []
  for name in FORMATS:
    package = name.rpartition('.')[0]
    if importlib.util.find_spec(package) and importlib.util.find_spec(name):
      found.append(importlib.import_module(name))
  return found


def _parser(
  formats: Sequence[ModuleType],
) -> tuple[errors.Parser, dict[ModuleType, set[str]]]:
  """The parser, and the flags that each format adds."""
  parser = errors.Parser(
    prog='sample.py',
    description='Generate images from prompts. Lists such as --steps 32,16,8 '
    'have one value per stage.',
  )
  add = parser.add_argument
  source = parser.add_mutually_exclusive_group()
  source.add_argument(
    '--prompt', help='what to generate; empty for unconditional images'
  )
  source.add_argument(
    '--prompts', type=user_path, help='a text file, one prompt a line'
  )
  source.add_argument(
    '--from_image',
    type=user_path,
    help='generate the image of a PNG again, from the settings in it',
  )
  add('--num_images', type=int, default=1, help='images per prompt')
  add('--seed', type=int, default=0, help='of the images')
  add(
    '--out',
    type=user_path,
    default='out',
    help='directory; nothing in it is overwritten',
  )
  add(
    '--model',
    type=user_path,
    help='model folder, or the name of a bundled one; demo if left out',
  )
  add(
    '--stages',
    type=sampling_flags.names,
    help='names of stages, such as base,sr1; all if left out',
  )
  add(
    '--low_res',
    type=user_path,
    help='an image for the first of --stages to upsample',
  )
  add('--init_image', type=user_path, help='an image to start from')
  add(
    '--mask', type=user_path, help='with --init_image: white where to inpaint'
  )
  add('--negative_prompt', help='what guidance steers away from')
  sampling_flags.add_flags(parser)
  add(
    '--weak_model',
    type=user_path,
    help='folder of weaker models of the stages, for --autoguidance',
  )
  add('--dtype', default='auto', help='auto, float32 or bfloat16')
  add('--batch_size', type=int, help='images at a time; at most 4 if left out')
  add(
    '--fsdp',
    type=int,
    help='devices that a network is split over; as few as needed if left out',
  )
  own = {}
  for module in formats:
    before = {action.dest for action in parser._actions}
    module.add_flags(parser)
    own[module] = {a.dest for a in parser._actions} - before
  runtime.add_process_flags(parser)
  return parser, own


def _main(argv: list[str]) -> None:
  formats = _formats()
  parser, own = _parser(formats)
  args = parser.parse_args(argv)
  given = parser.given(argv)
  out = output.Output(args.out, grid=args.from_image is None)
  if args.from_image is not None:
    for name in sorted(given.difference(WITH_FROM_IMAGE)):
      raise UsageError(
        'has no effect with --from_image, which repeats the settings in the '
        'image; leave it out.',
        key=name,
      )
    with out:
      from_image.repeat(args, out)
  else:
    prompts = _prompts(args)
    theirs = [m for m in formats if args.model and m.is_folder(args.model)]
    for name in sorted(given):
      if any(name in own[module] for module in set(own).difference(theirs)):
        raise UsageError('has no effect with this --model.', key=name)
    runtime.start(processes=args)
    generate = theirs[0].generate if theirs else _generate
    with out:
      generate(args, prompts, out)


def _prompts(args: argparse.Namespace) -> list[str]:
  if args.prompt is not None:
    return [args.prompt]
  if args.prompts is None:
    raise UsageError(
      'nothing to generate: add --prompt "a red circle above a blue square".'
    )
  text = files.read_text(
    args.prompts, advice='give a UTF-8 text file with one prompt a line'
  )
  prompts = [line.strip() for line in text.split('\n') if line.strip()]
  if not prompts:
    raise DataError(
      f'--prompts {args.prompts} is empty; write one prompt a line.'
    )
  return prompts


def _generate(
  args: argparse.Namespace, prompts: Sequence[str], out: output.Output
) -> None:
  """Generates with a model folder in the package's own layout."""
  from imagen_jax.cascade import batching, given_images, settings

  # Check everything before any work.
  request = batching.Request(
    prompts, args.seed, range(args.num_images), args.batch_size
  )
  cascade = imagen_jax.load(
    args.model,
    dtype=args.dtype,
    stages=args.stages,
    fsdp=args.fsdp,
    weak_model=args.weak_model,
  )
  choices = sampling_flags.choices(args)
  configs = cascade.settings(**choices)
  negative = args.negative_prompt or ''
  settings.check_negative(configs, negative)
  if cascade.weak and all(config.autoguidance == 1 for config in configs):
    raise UsageError(
      'has no effect without --autoguidance other than 1.', key='weak_model'
    )
  images = input_images.open_images(image=args.init_image, mask=args.mask)
  first = cascade.stages[0]
  given_images.check_images(
    first.name,
    first.low_resolution is not None,
    low_res=args.low_res,
    strength=choices['strength'],
    **images,
  )
  low_res = input_images.read_low_res(cascade, args.low_res)
  if 'image' in images and low_res is None:
    shape = cascade.shape_for(images['image'])
    input_images.note_crop(args.init_image, images['image'].size, *shape)
  embedding = cascade.embed(prompts, negative)
  for text in notes(cascade, embedding):
    output.note(text)
  made = record(cascade, configs, args) | {'batch_size': request.batch}
  cascade.sample(
    embedding,
    seed=args.seed,
    num_images=args.num_images,
    low_res=low_res,
    **images,
    batch_size=request.batch,
    callback=output.progress(),
    finished=out.of(request.records(made)),
    **choices,
  )


def notes(cascade: 'Cascade', embedding: Any) -> Iterator[str]:
  """Notes on the prompts, a sentence each."""
  every = *embedding.prompts, embedding.negative_prompt
  for prompt, cut in zip(every, embedding.cut):
    if cut:
      short = prompt if len(prompt) <= 40 else prompt[:39] + '…'
      yield (
        f'{short!r} is too long: its last {cut} tokens were cut, '
        f'{embedding.mask.shape[1]} remain.'
      )
  empty = any(not prompt.strip() for prompt in embedding.prompts)
  if empty and embedding.negative is None:
    yield 'an empty prompt is unconditional: guidance has no effect.'
  repeats = len(embedding.prompts) - len(set(embedding.prompts))
  if repeats:
    yield (
      f'{repeats} prompts repeat others, and so do their images; --num_images '
      'makes several of a prompt.'
    )
  if len(cascade.data_kinds) == 1:
    from imagen_jax.data.sources import find_source

    try:
      source = find_source(*cascade.data_kinds)
    except (ImagenError, ImportError):
      return  # sampling does not need the training data
    yield from source.prompt_notes(embedding.prompts)


def record(
  cascade: 'Cascade',
  configs: Sequence['SamplingConfig'],
  args: argparse.Namespace,
) -> dict[str, Any]:
  """The settings of a call, stored in its PNGs for --from_image.

  Args:
    cascade: that generates.
    configs: of its stages.
    args: the flags `seed`, `model`, `weak_model`, `negative_prompt`, `low_res`,
      `init_image` and `mask`.
  """
  import jax

  settings = {}
  for stage, config in zip(cascade.stages, configs):
    settings[stage.name] = {
      key: 'none' if (value := getattr(config, key)) is None else value
      for key in sampling_flags.PER_STAGE
    }
  return {
    'seed': args.seed,
    'devices': output.devices(),
    'dtype': cascade.dtype.name,
    'jax': jax.__version__,
    'model': str(args.model) if args.model else 'demo',
    'model_digest': cascade.digest,
    'weak_model': args.weak_model and str(args.weak_model),
    'weak_digest': cascade.weak_digest,
    'negative_prompt': args.negative_prompt,
    'low_res': args.low_res,
    'init_image': args.init_image,
    'mask': args.mask,
    'stages': settings,
    'version': imagen_jax.__version__,
  }


if __name__ == '__main__':
  sys.exit(main())
