"""Packages of icons: squares and discs of one colour each."""

import io
import json
import pathlib
import tarfile

from PIL import Image

THINGS = {  # Unicode's short name: (code points, colour)
  'dog': ('1f415', (255, 0, 0)),
  'cat': ('1f408', (0, 160, 0)),
  'fox': ('1f98a', (0, 0, 255)),
  'automobile': ('1f697', (160, 0, 160)),
  'rose': ('1f339', (0, 150, 150)),
  'red-heart': ('2764-fe0f', (120, 60, 0)),
}
LICENCE = {'twemoji': 'CC-BY-4.0', 'fluent-emoji-flat': 'MIT'}


def svg_body(colour: tuple[int, int, int]) -> str:
  """A square of 12 of the 16 units."""
  return f'<path fill="rgb{colour}" d="M2 2h12v12H2z"/>'


def iconify(name: str) -> dict[str, bytes]:
  """The files of a package in Iconify's layout."""
  icons = {n: {'body': svg_body(colour)} for n, (_, colour) in THINGS.items()}
  tables = {
    'package': {'name': f'@iconify-json/{name}', 'license': 'none'},
    'icons': {'prefix': name, 'icons': icons, 'width': 16, 'height': 16},
    'chars': {c: n for n, (c, _) in THINGS.items()} | {'1f1e6': 'gone'},
    'info': {'license': {'spdx': LICENCE[name]}},
    'metadata': {'categories': {'Animals & Nature': [*THINGS, 'gone']}},
  }
  return {f'{n}.json': json.dumps(t).encode() for n, t in tables.items()}


def by_code_points() -> dict[str, bytes]:
  """The files of a package of WebP images, of all things but the rose."""
  found = {}
  for name, (code, colour) in THINGS.items():
    image = Image.new('RGBA', (64, 64), (0, 0, 0, 0))
    image.paste((*colour, 255), (8, 20, 56, 44))  # twice as wide as high
    data = io.BytesIO()
    image.save(data, 'WEBP', lossless=True)
    if name != 'rose':
      found[f'assets/{code}.webp'] = data.getvalue()
  about = {'name': '@lobehub/fluent-emoji-3d', 'license': 'MIT'}
  return found | {'package.json': json.dumps(about).encode()}


def pack(path: pathlib.Path, files: dict[str, bytes]) -> None:
  """Writes files as npm pack does."""
  with tarfile.open(path, 'w:gz') as archive:
    for name, data in files.items():
      member = tarfile.TarInfo(f'package/{name}')
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))


def write(folder: pathlib.Path) -> pathlib.Path:
  """A folder of three sets, one of them unpacked, and of other files."""
  pack(folder / 'flat.tgz', iconify('fluent-emoji-flat'))
  pack(folder / 'solid.tgz', by_code_points())
  pack(folder / 'other.tgz', {'package.json': b'{"name": "x"}'})
  (folder / 'notes.txt').write_text('not a package')
  (folder / 'twemoji').mkdir()
  for name, data in iconify('twemoji').items():
    (folder / 'twemoji' / name).write_bytes(data)
  return folder
