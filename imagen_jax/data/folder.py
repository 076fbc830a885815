"""A folder of images with captions, the most common layout.

Either every image has a text file of the same name beside it,

  cats/one.jpg   cats/one.txt

or the folder holds a `metadata.jsonl` with one object per image:

  {"file_name": "cats/one.jpg", "text": "a cat asleep on a laptop"}
"""

import hashlib
import json
import mimetypes
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence

from imagen_jax.data import index_cache
from imagen_jax.data.checked import Checked, clean_caption, survey
from imagen_jax.errors import DataError
from imagen_jax.io import files
from imagen_jax.io.decode import SUFFIXES, BadSample, inspect
from imagen_jax.io.files import AnyPath

OTHERS = ('.heic', '.avif', '.jxl', '.jp2')  # which mimetypes may not know
CAPTION_KEYS = ('text', 'caption')


class FolderSource(Checked):
  """Random access to a folder's images, {'image', 'caption'} each.

  Images are decoded by `decode`. Images below `size` are skipped, since
  upsampling them would teach the model blur. Bad samples are skipped too:
  images that do not decode, captions that are missing or not text.

  Args:
    path: the folder, searched recursively; the others are `Checked`'s.

  Attributes:
    names: of the images, sorted, relative to the folder.
    captions: of the images.

  Raises:
    DataError: there is no folder or no usable image, too many are bad, or
      metadata.jsonl is broken.
  """

  path_is = 'a folder of images with .txt captions beside them'
  needs = (
    f'It needs images ({" ".join(SUFFIXES)}) with a .txt caption beside each, '
    'or a metadata.jsonl.'
  )

  def scan(self, path: AnyPath) -> tuple[dict[str, str], list[str]]:
    self.path = pathlib.Path(path)
    found, bad = _find(self.path)
    self.unused = dict(_unused(self.path, found.keys() | bad.keys()))
    sides, unreadable = _check(self.path, list(found))
    self.names = tuple(name for name in sides if sides[name] >= self.size)
    self.captions = tuple(found[name] for name in self.names)
    small = [name for name in sides if sides[name] < self.size]
    return bad | unreadable, small

  def __len__(self) -> int:
    return len(self.names)

  @property
  def fingerprint(self) -> str:
    """sha256 of the names and captions."""
    whole = json.dumps([self.names, self.captions])
    return hashlib.sha256(whole.encode()).hexdigest()

  def name(self, i: int) -> str:
    return self.names[i]

  def caption(self, i: int) -> str:
    return self.captions[i]

  def skipped_image(self, name: str) -> bytes | None:
    try:
      return (self.path / name).read_bytes()
    except OSError:
      return None

  def read(self, i: int) -> tuple[bytes, Sequence[str]]:
    file = self.path / self.names[i]
    try:
      return file.read_bytes(), [self.captions[i]]
    except FileNotFoundError:
      raise BadSample('it does not exist') from None


def _find(path: pathlib.Path) -> tuple[dict[str, str], dict[str, str]]:
  """({name: caption} sorted by name, {name: what is wrong})."""
  if not path.is_dir():
    raise DataError(
      f'{path} is not a folder: set data.path to one that holds images.'
    )
  metadata = path / 'metadata.jsonl'
  raw: Mapping[str, str | None]
  if metadata.is_file():
    raw, bad = _read_metadata(metadata)
  else:
    raw, bad = {name: None for name in _images(path)}, {}
  found = {}
  for name in sorted(raw):
    try:
      caption: str | bytes | None = raw[name]
      if caption is None:
        caption = _read_caption((path / name).with_suffix('.txt'))
      found[name] = clean_caption(caption)
    except BadSample as error:
      bad[name] = str(error)
  return found, bad


def _images(path: pathlib.Path) -> Iterator[str]:
  """Names, relative to `path`, of the files that look like images."""
  for file in path.rglob('*'):
    name = file.relative_to(path)
    if file.suffix.lower() in SUFFIXES and not files.is_hidden(name):
      yield name.as_posix()


def _unused(path: pathlib.Path, known: Collection[str]) -> Iterator[tuple]:
  """(name, reason) of the images that are no samples, sorted by name."""
  for file in sorted(path.rglob('*')):
    name = file.relative_to(path)
    kind, _ = mimetypes.guess_type(name)
    suffix = file.suffix.lower()
    image = suffix in (*SUFFIXES, *OTHERS) or (kind or '').startswith('image/')
    if image and not files.is_hidden(name) and name.as_posix() not in known:
      yield (
        name.as_posix(),
        'metadata.jsonl does not list it'
        if suffix in SUFFIXES
        else f'only {", ".join(SUFFIXES)} are read',
      )


def _read_metadata(
  file: pathlib.Path,
) -> tuple[dict[str, str], dict[str, str]]:
  """({file name: caption}, {file name: what is wrong}) of a metadata.jsonl."""
  found, bad = {}, {}
  for number, line in enumerate(file.read_bytes().split(b'\n'), start=1):
    if not line.strip():
      continue
    try:
      record = files.parse_json(line)
      name = record['file_name']
      caption = next(record[key] for key in CAPTION_KEYS if key in record)
      if not isinstance(name, str) or not isinstance(caption, str):
        raise TypeError('not strings')
    except (ValueError, KeyError, TypeError, StopIteration) as error:
      raise DataError(
        f'{file}, line {number}, is not an object with "file_name" and '
        '"text"; correct or remove the line.'
      ) from error
    place = files.inside('', name)
    if name in bad or (place and place.as_posix() in found):
      bad[f'line {number}'] = 'it lists an image a second time'
    elif place is None:
      bad[name] = 'its name points outside the folder'
    else:
      found[place.as_posix()] = caption
  return found, bad


def _read_caption(file: pathlib.Path) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise BadSample('it has no caption') from error


def _check(
  path: pathlib.Path, names: Sequence[str]
) -> tuple[dict[str, int], dict[str, str]]:
  """({name: shorter side in pixels}, {name: what is wrong}), both sorted.

  Cached; an image is read again if its `_state` has changed.
  """
  location = path.resolve()
  header, rows = index_cache.load('folder', location) or ({'names': []}, [])
  known = {name: (*row,) for name, row in zip(header['names'], rows)}
  states = {name: _state(path / name) for name in names}
  new = [n for n in names if known.get(n, ())[:2] != states[n]]
  found, bad = survey(
    new, lambda name: min(inspect(path / name)), f'checking {path}'
  )
  sides = {n: found.get(n) or int(known[n][2]) for n in names if n not in bad}
  if new:
    table = [[*states[name], side] for name, side in sides.items()]
    index_cache.save('folder', location, {'names': list(sides)}, table)
  return sides, bad


def _state(file: pathlib.Path) -> tuple[int, int]:
  """(size, modification time) of a file; (−1, −1) if it cannot be read."""
  try:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
  except OSError:
    return -1, -1
