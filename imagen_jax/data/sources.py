"""From a config's `data` section to a source of captioned pictures.

A source has `__len__` and `__getitem__(i) -> {'image': uint8 [size, size, 3],
'caption': str}`; any object that does can be trained on. Each kind is one
file, imported only when it is asked for.
"""

import json
import re

from imagen_jax.errors import UsageError

KINDS = ('shapes', 'emoji', 'folder', 'webdataset', 'tfds', 'arrayrecord')
RESIZE = ('area', 'bicubic', 'lanczos')
WHAT = {
  'folder': 'a folder of pictures with .txt captions beside them',
  'webdataset': "tars, such as 'shards/*.tar'",
  'tfds': 'the name or folder of a prepared TFDS build',
  'arrayrecord': 'what imagen-prepare wrote',
}


def make_source(
  *,
  kind,
  size,
  path=None,
  split='train',
  seed=0,
  resize='area',
  max_bad=0.01,
  mixture=None,
):
  """The pictures of a split at one size.

  Args:
    kind: 'shapes' and 'emoji' (drawn on the fly), 'folder', 'webdataset'
      (tars), 'tfds' or 'arrayrecord' (what imagen-prepare wrote).
    size: side of the pictures, in pixels.
    path: where they are, a pattern for several tars or prepared sets; unused by
      'shapes', and of 'emoji' the font, which is looked for if it is not given.
    split: 'train' or 'eval'; folders, tars and prepared sets have one split
      and give it for both.
    seed: of the shapes or emoji.
    resize: how pictures are made smaller: 'area', 'bicubic' or 'lanczos'.
    max_bad: share of bad samples above which to stop.
    mixture: shares of the categories in 'shapes', see `ShapesSource`.

  Raises:
    UsageError: unknown kind, resize or mixture, or no path.
    DataError: there are no usable pictures, or too many bad ones.
  """
  if kind not in KINDS:
    raise UsageError(f'data.kind is {kind!r}; it can be {" or ".join(KINDS)}.')
  if kind == 'shapes':
    from imagen_jax.worlds.shapes import ShapesSource

    return ShapesSource(seed, split, size, mixture=mixture)
  if kind == 'emoji':
    from imagen_jax.worlds.emoji import EmojiSource

    return EmojiSource(path, size, seed=seed, split=split)
  if not path:
    raise UsageError(
      f'data.path is not set: add --config.data.path=…, {WHAT[kind]}.'
    )
  scheme = re.match(r'(\w+)://', str(path))
  if scheme:
    raise UsageError(
      f'data.path {path} is not on a file system: mount it first (gcsfuse '
      'BUCKET /mnt/data for gs://) or download it, and give the local path.'
    )
  if resize not in RESIZE:
    raise UsageError(
      f'data.resize is {resize!r}; it can be {" or ".join(RESIZE)}.'
    )
  options = {'resize': resize, 'max_bad': max_bad}
  if kind == 'folder':
    from imagen_jax.data.folder import FolderSource

    return FolderSource(path, size, **options)
  if kind == 'webdataset':
    from imagen_jax.data.webdataset import WebDatasetSource

    return WebDatasetSource(path, size, **options)
  if kind == 'tfds':
    from imagen_jax.data.tfds import TfdsSource

    return TfdsSource(path, size, split=split, **options)
  from imagen_jax.data.arrayrecord import ArrayRecordSource

  return ArrayRecordSource(path, size, max_bad=max_bad)


def list_skipped(source, file):
  """Writes what a source left out as JSON lines, if it left out anything."""
  skipped = getattr(source, 'skipped', ())
  if skipped:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({'name': n, 'reason': r}) for n, r in skipped]
    file.write_text('\n'.join(lines) + '\n', encoding='utf-8')
