"""Icon sets that packages ship: images by code point, with names and licence.

Read as files from the packages' archives or folders; nothing is executed. Two
layouts are known: Iconify's (`icons.json` with the SVG of every icon) and
images that are named by their code points (`assets/1f98a.webp`,
`color/svg/1F98A.svg`).
"""

import csv
import dataclasses
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any

from imagen_jax.errors import DataError

# The word that captions have for the style of a set; others have their name.
STYLES = {
  'fluent-emoji-3d': '3D',
  'fluent-emoji-flat': 'flat',
  'twemoji': 'cartoon',
  'noto': 'shaded',
  'openmoji': 'outlined',
}
# Of Unicode's groups, those of things.
GROUPS = (
  'animals-nature',
  'food-drink',
  'objects',
  'activities',
  'travel-places',
  'smileys-emotion',
)
_IMAGE = re.compile(
  r'(?:assets|color/svg)/([0-9a-fA-F]+(?:-[0-9a-fA-F]+)*)\.(?:svg|webp|png)'
)
_OTHERS = re.compile(
  r'(package|icons|chars|info|metadata)\.json|data/openmoji\.csv'
)


@dataclasses.dataclass(frozen=True)
class IconSet:
  """The icons of one package.

  Attributes:
    style: the word that captions have for it, such as 'flat'.
    licence: its SPDX name, such as 'MIT'.
    images: {code points such as '1f98a': SVG text or image file}.
    names: {code points: Unicode's short name}, of things only; {} if the
      package has no names.
    more: {code points: further images of the same thing}.
    partial: whether it shows a few things only, and is no reason to leave out
      the others.
  """

  style: str
  licence: str
  images: Mapping[str, bytes]
  names: Mapping[str, str]
  more: Mapping[str, tuple[bytes, ...]] = dataclasses.field(
    default_factory=dict
  )
  partial: bool = False

  def of(self, code: str) -> tuple[bytes, ...]:
    """All images of a thing; () if it has none."""
    if code not in self.images:
      return ()
    return self.images[code], *self.more.get(code, ())


def read_sets(path: str | os.PathLike[str]) -> list[IconSet]:
  """The icon sets of a folder, in the order of their files' names.

  Args:
    path: a package (.tgz, or its folder unpacked), or a folder of packages,
      where other files are passed over.

  Raises:
    DataError: there are none, or one of them is damaged.
  """
  path = pathlib.Path(path)
  if path.is_dir() and not (path / 'package.json').exists():
    found = [*path.glob('*.tgz'), *(p.parent for p in _manifests(path))]
  else:
    found = [path]
  sets = [one for package in sorted(found) for one in _read(package)]
  if not sets:
    raise DataError(
      f'{path} has no icon set; fetch some with npm pack (see docs/icons.md) '
      'and set data.path to their folder.'
    )
  return sets


def _manifests(folder: pathlib.Path) -> Iterable[pathlib.Path]:
  """The package.json of the packages that are unpacked in a folder."""
  return folder.glob('*/package.json')


def _wanted(name: str) -> bool:
  return bool(_OTHERS.fullmatch(name) or _IMAGE.fullmatch(name))


def _files(package: pathlib.Path) -> dict[str, bytes]:
  """The files of a package that matter here, by their names inside it."""
  if package.is_dir():
    every = (p for p in package.rglob('*') if p.is_file())
    names = {p.relative_to(package).as_posix(): p for p in every}
    return {n: p.read_bytes() for n, p in names.items() if _wanted(n)}
  files = {}
  with tarfile.open(package) as archive:
    for member in archive:
      name = member.name.partition('/')[2]
      if member.isfile() and _wanted(name):
        opened = archive.extractfile(member)
        files[name] = opened.read() if opened else b''
  return files


def _read(package: pathlib.Path) -> list[IconSet]:
  """The set of a package; [] if it is another kind of package."""
  try:
    files = _files(package)
    if 'package.json' not in files:
      return []
    about = json.loads(files['package.json'])
    if 'icons.json' in files and 'chars.json' in files:
      return [_iconify(files)]
    images = {
      code_points(match[1]): files[name]
      for name in sorted(files)
      if (match := _IMAGE.fullmatch(name))
    }
    if not images:
      return []
    name = str(about['name']).rpartition('/')[2]
    names = _openmoji_names(files.get('data/openmoji.csv', b''))
    return [IconSet(STYLES.get(name, name), about['license'], images, names)]
  except (OSError, EOFError, ValueError, KeyError, tarfile.TarError) as error:
    raise DataError(
      f'{package} cannot be read as a package of icons ({error!r}); fetch it '
      'again with npm pack.'
    ) from error


def _iconify(files: Mapping[str, bytes]) -> IconSet:
  """A set in Iconify's layout."""
  icons, chars, info, metadata = (
    json.loads(files.get(f'{name}.json', b'{}'))
    for name in ('icons', 'chars', 'info', 'metadata')
  )
  things = {
    name
    for group, members in metadata.get('categories', {}).items()
    if re.sub(r'[^a-z]+', '-', group.lower()) in GROUPS
    for name in members
  }
  images, names = {}, {}
  for code, name in chars.items():
    if icon := icons['icons'].get(name):
      images[code_points(code)] = _svg(icon, icons).encode()
      if name in things:
        names[code_points(code)] = short_name(name)
  prefix = icons['prefix']
  licence = info['license']['spdx']
  return IconSet(STYLES.get(prefix, prefix), licence, images, names)


def _svg(icon: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
  left, top, width, height = (
    icon.get(key, defaults.get(key, default))
    for key, default in (('left', 0), ('top', 0), ('width', 16), ('height', 16))
  )
  box = f'{left} {top} {width} {height}'
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">'
    f'{icon["body"]}</svg>'
  )


def _openmoji_names(table: bytes) -> dict[str, str]:
  return {
    code_points(row['hexcode']): short_name(row['annotation'])
    for row in csv.DictReader(table.decode().splitlines())
    if row['group'] in GROUPS and not row['skintone']
  }


def code_points(text: str) -> str:
  """'2764-FE0F' -> '2764': lower case, without variation selectors."""
  return '-'.join(c for c in text.lower().split('-') if c != 'fe0f')


def short_name(text: str) -> str:
  """'T-shirt' -> 't shirt': Unicode's short name in small letters."""
  return ' '.join(re.sub(r"[’']", '', text.lower()).replace('-', ' ').split())
