"""sample.py --from_image: generates an image again."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

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
  _check(record, file)
  runtime.start(processes=args)
  try:
    _generate(args, record, out)
  except UsageError as error:
    if error.key == 'fsdp':  # the user's
      raise
    raise DataError(
      f'the metadata of {file} cannot be repeated ({error}); another version '
      'wrote it, or it was changed.'
    ) from error


def _generate(
  args: argparse.Namespace, record: Mapping[str, Any], out: output.Output
) -> None:
  """Generates the image of a checked record."""
  stages = record['stages']
  cascade = imagen_jax.load(
    args.model or record['model'],
    dtype=record['dtype'],
    stages=list(stages),
    fsdp=args.fsdp,
    weak_model=args.weak_model or record.get('weak_model'),
  )
  # Images older than a flag have no value for it.
  call: dict[str, Any] = {
    key: [settings.get(key) for settings in stages.values()]
    for key in sampling_flags.PER_STAGE
  }
  call |= {key: record[key] for key in ('seed', 'batch_size')}
  call['indices'] = [record['index']]
  low_path = record.get('low_res')
  for key, here in (
    ('model_digest', cascade.digest),
    ('weak_digest', cascade.weak_digest),
  ):
    if record.get(key) != here:
      output.note(
        f'{args.from_image} was generated with other weights '
        f'({record.get(key)}, here {here}); the image will differ.'
      )
  if not record.get('init_image'):
    del call['strength']  # without effect
  cascade.sample(
    [record['prompt']],
    negative_prompt=record.get('negative_prompt') or '',
    low_res=input_images.read_low_res(cascade, low_path),
    **input_images.open_images(
      image=record.get('init_image'), mask=record.get('mask')
    ),
    callback=output.progress(),
    finished=out.of([{**record, 'devices': output.devices()}]),
    **call,
  )


def _check(record: Mapping[str, Any], file: str) -> None:
  """Rejects a record that is incomplete, or whose values are not of its kind.

  Raises:
    DataError: it was changed, or another program wrote it.
  """
  from imagen_jax.cascade import batching

  word = lambda value: isinstance(value, str) and '\0' not in value
  path = lambda value: value is None or word(value)
  rules: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(('prompt', 'model', 'model_digest', 'dtype'), word),
    **dict.fromkeys(('low_res', 'init_image', 'mask', 'weak_model'), path),
    'negative_prompt': lambda value: value is None or isinstance(value, str),
    'seed': lambda value: _whole(value, 0, batching.SEEDS - 1),
    'index': lambda value: _whole(value, 0, batching.SEEDS - 1),
    'batch_size': lambda value: _whole(value, 1, batching.MAX_BATCH),
    'stages': _are_stages,
  }
  for key, valid in rules.items():
    if not valid(record.get(key)):
      raise DataError(
        f'the metadata of {file} has no valid {key} '
        f'({str(record.get(key))[:60]}); another version wrote it, or it was '
        'changed.'
      )


def _whole(value: Any, least: int, most: int) -> bool:
  return type(value) is int and least <= value <= most


def _are_stages(stages: Any) -> bool:
  """Whether it is {name: {a flag of sampling: its value}}, not empty."""
  if not isinstance(stages, dict) or not stages:
    return False
  for settings in stages.values():
    if not isinstance(settings, dict):
      return False
    for key, (kind, _) in sampling_flags.PER_STAGE.items():
      value = settings.get(key)
      absent = value == 'none' and key in sampling_flags.NULLABLE
      if not (value is None or absent or _is_setting(value, kind)):
        return False
  return True


def _is_setting(value: Any, kind: type) -> bool:
  """Whether a record's value is of a flag's type."""
  if kind is tuple:
    return isinstance(value, list) and all(_is_setting(v, float) for v in value)
  return type(value) is kind or (kind is float and type(value) is int)
