"""sample.py --from_image: generates an image again."""

import argparse

import imagen_jax
from imagen_jax.cli import input_images, output, runtime, sampling_flags
from imagen_jax.errors import DataError, UsageError


def repeat(args: argparse.Namespace, out: output.Output) -> None:
  """Generates an image again from its PNG's record."""
  from imagen_jax.io import images as image_io

  file = args.from_image
  record = image_io.read_metadata(file)
  if 'format' in record:
    raise UsageError(
      f'{file} was generated with {record["format"]}, which --from_image does '
      'not repeat; give the settings in its metadata as flags.'
    )
  runtime.start(processes=args)
  try:
    stages = record['stages']
    demo = record['model'] == 'demo'
    cascade = imagen_jax.load(
      args.model or (None if demo else record['model']),
      dtype=record['dtype'],
      stages=list(stages),
      fsdp=args.fsdp,
    )
    # Images older than a flag have no value for it.
    call = {
      key: [settings.get(key) for settings in stages.values()]
      for key in sampling_flags.PER_STAGE
    }
    call |= {key: record[key] for key in ('seed', 'batch_size')}
    call['indices'] = [record['index']]
    digest, low_path = record['model_digest'], record['low_res']
    prompt = record['prompt']
  except (KeyError, TypeError, AttributeError) as error:
    raise DataError(
      f'the metadata of {file} is incomplete ({error}); another version wrote '
      'it, or it was changed.'
    ) from error
  if cascade.digest != digest:
    output.note(
      f'{file} was generated with other weights ({digest}, here '
      f'{cascade.digest}); the image will differ.'
    )
  if not record.get('init_image'):
    del call['strength']  # without effect
  cascade.sample(
    [prompt],
    low_res=input_images.read_low_res(cascade, low_path),
    **input_images.open_images(
      image=record.get('init_image'), mask=record.get('mask')
    ),
    callback=output.progress(),
    finished=out.of([record | {'devices': output.devices()}]),
    **call,
  )
