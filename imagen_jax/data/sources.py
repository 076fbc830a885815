"""Builds a source of captioned images from a config's `data` section."""

import inspect
from typing import Any

from imagen_jax import kinds
from imagen_jax.data.source import Source
from imagen_jax.errors import UsageError, check_choice
from imagen_jax.io import bucket
from imagen_jax.io.decode import RESIZE
from imagen_jax.io.paths import user_path

# Each kind is one file, imported on demand.
KINDS = {
  'folder': 'imagen_jax.data.folder:FolderSource',
  'webdataset': 'imagen_jax.data.webdataset:WebDatasetSource',
  'tfds': 'imagen_jax.data.tfds:TfdsSource',
  'arrayrecord': 'imagen_jax.data.arrayrecord:ArrayRecordSource',
  'mixture': 'imagen_jax.data.mixture:MixtureSource',
  'shapes': 'imagen_jax.worlds.shapes:ShapesSource',
  'emoji': 'imagen_jax.worlds.emoji:EmojiSource',
  'icons': 'imagen_jax.worlds.icons:IconsSource',
}
# Values that match what a source without the option does anyway.
IGNORABLE = {
  'path': (None, ''),
  'seed': (0,),
  'resize': ('area',),
  'max_bad': (0.01,),
  'aspect': ('crop',),
  'text': ('auto',),
}


def find_source(kind: str) -> type[Source]:
  """The class of a kind of source.

  Args:
    kind: one of `KINDS`, or 'my_module:MySource'.

  Raises:
    UsageError: there is no such class.
  """
  return kinds.find(kind, KINDS, key='config.data.kind', base=Source)


def make_source(
  *,
  kind: str,
  size: int,
  split: str = 'train',
  eval_path: str | None = None,
  **options: Any,
) -> Source:
  """The source of a split, at one image size.

  Args:
    kind: one of `KINDS`, or 'my_module:MySource', a `Source` of the user's.
    size: side of the images, in pixels.
    split: 'train' or 'eval'; a source without an eval split gives the same
      images for both.
    eval_path: the `path` of split 'eval'; None: the same as of 'train'.
    **options: keys of a config's `data` section: `path`, `seed`, `resize`,
      `max_bad`, and the class's own. The constructor gets those that it names.

  Raises:
    UsageError: unknown kind or resize, no path, or an option without effect.
    DataError: there are no usable images, or too many bad ones.
  """
  cls, given = source_options(
    kind=kind, size=size, split=split, eval_path=eval_path, **options
  )
  return cls(**given)


def source_options(
  *,
  kind: str,
  size: int,
  split: str = 'train',
  eval_path: str | None = None,
  **options: Any,
) -> tuple[type[Source], dict[str, Any]]:
  """(the class, the arguments of its constructor) of `make_source`."""
  cls = find_source(kind)
  known = inspect.signature(cls.__init__).parameters
  takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
  if eval_path and not ('path' in known or takes_all):
    raise _without_effect('eval_path', None, eval_path, kind)
  if eval_path and split == 'eval':
    options |= {'path': eval_path, 'index': None}
  path = options.get('path')
  if cls.path_is is not None:
    if not path:
      raise UsageError(
        f'data.path is not set; it names {cls.path_is}.', key='config.data.path'
      )
    if bucket.is_bucket(str(path)) and not cls.in_bucket:
      raise UsageError(
        f'data.path {path} is in a bucket, which data.kind={kind} does not '
        'read: mount it first (gcsfuse BUCKET /mnt/data for gs://), download '
        'it, or take webdataset or arrayrecord.',
        key='config.data.path',
      )
    options['path'] = user_path(path)
  if not 0 <= options.get('seed', 0) < 2**32:
    raise UsageError(
      f'data.seed is {options["seed"]}; it must be in [0, 4294967295].',
      key='config.data.seed',
    )
  resize = options.get('resize', 'area')
  check_choice('data.resize', resize, RESIZE, key='config.data.resize')
  given = {'size': size, 'split': split, **options}
  for name, value in options.items():
    if name not in known and not takes_all:
      same = IGNORABLE.get(name, (None,))
      if value is not None and value not in same:
        raise _without_effect(name, same[0], value, kind)
  return cls, {k: v for k, v in given.items() if takes_all or k in known}


def _without_effect(name: str, same: Any, value: Any, kind: str) -> UsageError:
  """The error of an option that a kind of source does not take."""
  return UsageError(
    f'data.{name}={same} is needed with data.kind={kind}: {value!r} has no '
    'effect there.',
    key=f'config.data.{name}',
  )
