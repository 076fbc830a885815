"""Embeddings of a prepared set's captions, in a folder beside its images.

mine/text/t5-xxl-int8/embeddings.json          the header; written last
mine/text/t5-xxl-int8/part-00000.array_record  one record for each of the
                                               images' part of that name
mine/text/t5-xxl-int8/part-00000.json          its count, size and digests
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.data.checked import CLEANING
from imagen_jax.data.records import Part, Records
from imagen_jax.data.shards import short
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import bucket, embeddings, files
from imagen_jax.io.files import AnyPath

FORMAT_VERSION = 1
FOLDER, HEADER = 'text', 'embeddings.json'
# What determines the numbers that are stored, and what each is called.
IDENTITY = {
  'kind': ('kind of encoder', str),
  'dim': ('width', int),
  'max_len': ('max_len', int),
  'dtype': ('dtype of the encoder', str),
  'store': ('precision', str),
  'encoder': ('encoder', str),
  'mark': ('encoder', str),
  'tokenizer': ('tokenizer', str),
  'cleaning': ('cleaning of captions', str),
}


class Embeddings:
  """The stored embeddings of prepared sets, image by image.

  Args:
    folders: of embeddings, one for each set.
    sets: (header, parts) of the images of each set.

  Attributes:
    header: the values of `IDENTITY`.

  Raises:
    DataError: they are unfinished, damaged, of other images, or differ from set
      to set.
  """

  def __init__(
    self,
    folders: Sequence[pathlib.Path],
    sets: Sequence[tuple[Mapping[str, Any], Sequence[Part]]],
  ) -> None:
    headers = [read_header(folder) for folder in folders]
    self.header = {key: headers[0][key] for key in IDENTITY}
    self._records = Records(
      [
        part
        for folder, header, (images, parts) in zip(folders, headers, sets)
        for part in _parts(folder, header, images, parts)
      ]
    )
    for folder, header in zip(folders, headers):
      check(header, self.header, f'{folder} holds', f'{folders[0]} has')

  def __len__(self) -> int:
    return len(self._records)

  def example(self, i: int, captions: int) -> dict[str, Any]:
    """`text` bfloat16 [max_len, dim] and `mask` [max_len] of image `i`.

    Of an image with several captions, each is a tuple with an entry for each.

    Raises:
      BadSample, OSError: as `Records`.
      ValueError: the record is damaged, or has not as many captions.
    """
    dim, length = self.header['dim'], self.header['max_len']
    found = embeddings.unpack(self._records[i], dim, self.header['store'])
    if len(found) != captions or max(map(len, found)) > length:
      raise ValueError('it has other captions')
    texts, masks = [], []
    for rows in found:
      full = np.zeros((length, dim), rows.dtype)
      full[: len(rows)] = rows
      texts.append(full)
      masks.append(np.arange(length) < len(rows))
    if captions == 1:
      return {'text': texts[0], 'mask': masks[0]}
    return {'text': tuple(texts), 'mask': tuple(masks)}


def check(
  have: Mapping[str, Any], want: Mapping[str, Any], where: str, other: str
) -> None:
  """Checks that embeddings are those that are wanted.

  Args:
    have: a header.
    want: some of its entries, as they should be.
    where, other: the beginning of the message, such as 'data/mine holds', and
      what it differs from, 'text.path and text.max_len give'.

  Raises:
    DataError: an entry differs; the message names it.
  """
  for key, value in want.items():
    if have[key] != value:
      raise DataError(
        f'{where} embeddings of another {IDENTITY[key][0]} '
        f'({short(have[key])}) than {other} ({short(value)}); set those to '
        'what they were made with, choose others with data.text, or make them '
        'with imagen-embed.'
      )


def find(folder: AnyPath, text: str | None) -> pathlib.Path | None:
  """The folder of a set's embeddings.

  Args:
    folder: of the set.
    text: 'auto' for the only one that there is; the name of one; a path; None
      for none.

  Raises:
    UsageError: there is not that one, or more than one.
  """
  if text is None:
    return None
  if text != 'auto' and '/' in text:
    return bucket.at(text)
  above = bucket.at(folder) / FOLDER
  there = above.iterdir() if above.exists() else ()
  names = sorted(
    p.name for p in there if p.is_dir() and not p.name.startswith('.')
  )
  if text == 'auto' and len(names) < 2:
    return above / names[0] if names else None
  if text not in names:
    listed = ', '.join(names) or 'none'
    raise UsageError(
      f'data.text is {text!r}, and {folder} has the embeddings {listed}; '
      'choose one, make them with imagen-embed, or set data.text=None to embed '
      'the captions while training.',
      key='config.data.text',
    )
  return above / text


def read_header(folder: pathlib.Path) -> dict[str, Any]:
  """The header of finished embeddings.

  Raises:
    DataError: they are unfinished, damaged, or of a newer format.
  """
  file = folder / HEADER
  header = files.read_json(
    file,
    error=DataError,
    version=FORMAT_VERSION,
    missing='they are not finished: repeat the imagen-embed command, or set '
    'data.text=None to embed the captions while training',
  )
  types = {key: kind for key, (_, kind) in IDENTITY.items()}
  files.check_keys(file, header, parts=list, **types)
  for part in header['parts']:
    files.check_keys(file, part, name=str, count=int, bytes=int, of=str)
  if header['store'] not in embeddings.STORES:
    raise DataError(
      f'{file}: embeddings are stored as {header["store"]!r}, which this '
      f'version of imagen_jax does not read: upgrade, or {files.COPY_AGAIN}.'
    )
  return header


def _parts(
  folder: pathlib.Path,
  header: Mapping[str, Any],
  images: Mapping[str, Any],
  parts: Sequence[Part],
) -> Iterator[Part]:
  """The parts of the embeddings, one for each of the images' parts.

  Args:
    folder, header: of the embeddings.
    images: the header of the set.
    parts: its parts that have images.

  Raises:
    DataError: one is missing, or belongs to other images.
  """
  named = {entry['name']: entry for entry in header['parts']}
  of = {entry['name']: entry.get('sha256') for entry in images['parts']}
  for part in parts:
    name = os.path.basename(part.path)
    entry = named.get(name)
    if entry is None:
      raise DataError(
        f'{folder} has no embeddings of {name}, whose images were all left out '
        'as duplicates when the others were embedded; repeat the imagen-embed '
        'command, which adds them.'
      )
    if (entry['of'], entry['count']) != (of[name], part.count):
      raise DataError(
        f'{folder} was made for other images than those of {part.path}; make '
        'it again with imagen-embed, in another folder, or set data.text=None.'
      )
    path = f'{os.fspath(folder)}/{name}'
    yield dataclasses.replace(part, path=path, bytes=entry['bytes'])


def identity(**values: Any) -> dict[str, Any]:
  """The header of embeddings to be made; see `IDENTITY`."""
  return {key: (values | {'cleaning': CLEANING})[key] for key in IDENTITY}
