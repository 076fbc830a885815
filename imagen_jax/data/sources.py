"""From a config's `data` section to a source of captioned pictures.

A source has `__len__` and `__getitem__(i) -> {'image': uint8 [size, size, 3],
'caption': str}`; any object that does can be trained on.
"""

from imagen_jax.errors import UsageError

KINDS = ('shapes', 'folder')


def make_source(*, kind, size, path=None, split='train', seed=0):
  """The pictures of a split at one size.

  Args:
    kind: 'shapes' (drawn on the fly) or 'folder' (pictures with captions).
    size: side of the pictures, in pixels.
    path: the folder; unused by 'shapes'.
    split: 'train' or 'eval'; a folder has one split and gives it for both.
    seed: of the shapes.

  Raises:
    UsageError: unknown kind, or a folder without a path.
    DataError: the folder holds no usable pictures.
  """
  if kind == 'shapes':
    from imagen_jax.data.shapes import ShapesSource

    return ShapesSource(seed, split, size)
  if kind == 'folder':
    from imagen_jax.data.folder import FolderSource

    if not path:
      raise UsageError(
        'data.path is not set: add --config.data.path=DIR, a folder of '
        'pictures with .txt captions beside them.'
      )
    return FolderSource(path, size)
  raise UsageError(f'data.kind is {kind!r}; it can be {" or ".join(KINDS)}.')
