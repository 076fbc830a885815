"""Photos for the icons world: Tux Paint's stamps, from their Debian package.

A stamp is `fox.png`, a cut-out with transparency, and `fox.txt`, whose first
line is its caption, "A fox." Nothing in the package says which stamps are
photos; `stamps.txt` does.
"""

import functools
import importlib.resources
import os
import pathlib
import re
from collections.abc import Mapping

from imagen_jax.errors import DataError
from imagen_jax.worlds.icon_sets import IconSet

STYLE = 'photo'
LICENCE = 'GPL-2.0-or-later'
# Where the stamps may be in the folder of the packages: a link to the installed
# ones or to what holds them, or the package unpacked.
FOLDERS = (
  '*',
  '*/stamps',
  'usr/share/tuxpaint/stamps',
  '*/usr/share/tuxpaint/stamps',
)


def read_stamps(
  path: str | os.PathLike[str], names: Mapping[str, str]
) -> list[IconSet]:
  """The set of the photos; [] if there are no stamps.

  Args:
    path: the folder of the packages.
    names: {name: code points} of the things of the other sets.

  Raises:
    DataError: a file cannot be read.
  """
  path = pathlib.Path(path)
  folders = (f for place in FOLDERS for f in sorted(path.glob(place)))
  return [_read(f, names) for f in folders if _has_stamps(f)][:1]


@functools.cache
def photos() -> dict[str, str]:
  """{stamp such as 'animals/birds/owl': its thing, or '' as its caption}."""
  path = importlib.resources.files('imagen_jax.worlds') / 'stamps.txt'
  lines = path.read_text(encoding='utf-8').splitlines()
  parts = (line.partition('=') for line in lines if line[:1] not in ('', '#'))
  return {stamp.strip(): name.strip() for stamp, _, name in parts}


def named(caption: str) -> str:
  """'A pair of scissors.' -> 'scissors': what a stamp's caption names."""
  text = caption.strip().lower().rstrip('.!')
  return re.sub(r'^(a|an|the) (pair of )?', '', text)


def _has_stamps(folder: pathlib.Path) -> bool:
  return any((folder / f'{stamp}.png').exists() for stamp in photos())


def _read(folder: pathlib.Path, names: Mapping[str, str]) -> IconSet:
  found: dict[str, list[bytes]] = {}
  for stamp, name in photos().items():
    image, text = (folder / f'{stamp}.{end}' for end in ('png', 'txt'))
    try:
      if not image.exists() or not (name or text.exists()):
        continue
      name = name or named(_first_line(text))
      if name.lower() in names:
        found.setdefault(names[name.lower()], []).append(image.read_bytes())
    except OSError as error:
      raise DataError(f'{image} cannot be read ({error}).') from error
  return IconSet(
    STYLE,
    LICENCE,
    {code: images[0] for code, images in found.items()},
    {},
    {code: tuple(images[1:]) for code, images in found.items()},
    partial=True,
  )


def _first_line(path: pathlib.Path) -> str:
  """The caption in English; others follow it."""
  return path.read_text(encoding='utf-8', errors='replace').partition('\n')[0]
