"""A folder of pictures with their captions, as most people keep them.

Either every picture has a text file of the same name beside it,

  cats/one.jpg   cats/one.txt

or the folder holds a `metadata.jsonl` with one object per picture:

  {"file_name": "cats/one.jpg", "text": "a cat asleep on a laptop"}
"""

import collections
import functools
import json
import logging
import pathlib

import numpy as np
from PIL import Image, ImageOps

from imagen_jax.errors import DataError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')
CAPTION_KEYS = ('text', 'caption')


class FolderSource:
  """Random access to a folder's pictures, {'image', 'caption'} each.

  Pictures are turned upright, laid on white where transparent, cut to their
  central square and made smaller by averaging. None is ever enlarged: a
  picture below the size asked for would teach blur. Such a picture, one whose
  header cannot be read and one without a caption are left out when the folder
  is opened, by header alone, and named in one log line.

  Args:
    path: the folder, searched in depth.
    size: side of the pictures in pixels.

  Attributes:
    skipped: [(file name, reason)], what was left out.

  Raises:
    DataError: no folder, no usable picture, or a broken metadata.jsonl.
  """

  def __init__(self, path, size):
    self.path, self.size = pathlib.Path(path), size
    self.names, self.captions, self.skipped = _index(self.path, size)

  def __len__(self):
    return len(self.names)

  def __getitem__(self, i):
    """{'image': uint8 [size, size, 3], 'caption': str}.

    Raises:
      DataError: the picture's header was fine but its content is not.
    """
    file = self.path / self.names[int(i)]
    try:
      image = read_picture(file, self.size)
    except (OSError, ValueError, SyntaxError) as error:
      raise DataError(
        f'{file} cannot be decoded ({error}); it is damaged or was changed '
        'after the run began: remove or replace it and run again.'
      ) from error
    return {'image': image, 'caption': self.captions[int(i)]}


def read_picture(file, size):
  """A picture as uint8 [size, size, 3]: upright, on white, square, averaged.

  Args:
    file: anything Pillow reads; of an animation the first frame.
    size: side in pixels, at most the picture's shorter one.
  """
  with Image.open(file) as image:
    # Cameras store the sensor's rows and say in EXIF how they were held.
    image = _rgb(ImageOps.exif_transpose(image))
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  # BOX is the mean over each target pixel's area, fractions of pixels too.
  square = image.resize(
    (size, size),
    Image.Resampling.BOX,
    box=(left, top, left + side, top + side),
  )
  return np.asarray(square)


def _rgb(image):
  """Any Pillow mode as RGB, without the traps of a bare convert('RGB')."""
  if image.mode.startswith('I'):
    # 16-bit grey; convert would clip everything above 255 to white.
    grey = np.clip(np.asarray(image, np.float64) / 257, 0, 255)
    image = Image.fromarray(np.rint(grey).astype(np.uint8))
  elif image.has_transparency_data:
    # convert would show whatever colour hides under the transparent pixels.
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB')


def _index(path, size):
  """(names, captions, skipped) of a folder, all sorted by name."""
  if not path.is_dir():
    raise DataError(
      f'{path} is not a folder: set data.path to one that holds pictures.'
    )
  metadata = path / 'metadata.jsonl'
  if metadata.is_file():
    found = _read_metadata(metadata)
  else:
    found = {name: None for name in _pictures(path)}
  names, captions, skipped = [], [], []
  for name in sorted(found):
    file = path / name
    caption, problem = found[name], None
    if caption is None:
      caption, problem = _read_caption(file.with_suffix('.txt'))
    problem = problem or _check_header(file, size)
    if problem is None and not caption.strip():
      problem = 'its caption is empty'
    if problem is None:
      names.append(name)
      captions.append(' '.join(caption.split()))
    else:
      skipped.append((name, problem))
  if skipped:
    _tell(
      f'{path}: {len(names)} pictures, {len(skipped)} left out: '
      f'{_summary(skipped)}'
    )
  if not names:
    reason = _summary(skipped) if skipped else f'no {" ".join(SUFFIXES)} files'
    raise DataError(
      f'{path} has no picture to train on at {size} pixels: {reason}. '
      'It needs pictures with a .txt caption beside each, or a '
      'metadata.jsonl.'
    )
  return tuple(names), tuple(captions), tuple(skipped)


def _pictures(path):
  """Names, relative to `path`, of the files that look like pictures."""
  for file in path.rglob('*'):
    # Names with a leading dot are other programs' business (._one.jpg).
    if file.suffix.lower() in SUFFIXES and not file.name.startswith('.'):
      yield file.relative_to(path).as_posix()


def _read_metadata(file):
  """{file name: caption} of a metadata.jsonl."""
  found = {}
  with file.open(encoding='utf-8') as lines:
    for number, line in enumerate(lines, start=1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
        name = record['file_name']
        caption = next(record[key] for key in CAPTION_KEYS if key in record)
        if not isinstance(name, str) or not isinstance(caption, str):
          raise TypeError('not strings')
        found[name] = caption
      except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise DataError(
          f'{file}, line {number}, is not an object with "file_name" and '
          '"text": mend or remove the line.'
        ) from error
  return found


def _read_caption(file):
  """(caption, None), or (None, what is wrong)."""
  try:
    return file.read_text(encoding='utf-8'), None
  except OSError:
    return None, 'it has no caption'
  except UnicodeDecodeError:
    return None, 'its caption is not UTF-8'


def _check_header(file, size):
  """What is wrong with a picture as far as its header tells, or None."""
  try:
    with Image.open(file) as image:
      side, mode = min(image.size), image.mode
  except FileNotFoundError:
    return 'it does not exist'
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
    return 'it cannot be read as a picture'
  if side < size:
    return f'it is smaller than {size} pixels'
  if mode == 'F':
    return 'its pixels have no fixed range (floating point)'
  return None


@functools.cache
def _tell(message):
  """Once: a run opens its folder for training and again for previews."""
  logging.getLogger(__name__).warning('%s', message)


def _summary(skipped, examples=3):
  """'2 because it has no caption (a.png, b.png), …', most common first."""
  by_reason = collections.defaultdict(list)
  for name, reason in skipped:
    by_reason[reason].append(name)
  return ', '.join(
    f'{len(names)} because {reason} ({", ".join(names[:examples])}'
    f'{", …" if len(names) > examples else ""})'
    for reason, names in sorted(by_reason.items(), key=lambda e: -len(e[1]))
  )
