"""Whose folder it is: how workers that never talk to each other agree on a set.

They agree by two files that are written whole, once, before any part:

  mine/spec.json             the settings; a folder that has it is this set's
  mine/shards-1a2b3c….json   the tars, by content; a set of ranges has none
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.data.shards import (
  FORMAT_VERSION,
  Shard,
  Spec,
  ranges_of,
  short,
)
from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import bucket, files
from imagen_jax.io.files import AnyPath

SPEC = 'spec.json'


def claim(out: AnyPath, spec: Spec, shards: Sequence[Shard]) -> list[Shard]:
  """Makes a new folder this set's, or checks that an old one is.

  Returns:
    the shards as they were when the folder was new: a tar that has vanished
    since is among them.

  Raises:
    UsageError: the folder holds something else, or there are more tars.
  """
  folder = bucket.at(out, key='out')
  names = None
  if shards[0].path:
    text = json.dumps({'shards': [shard.name for shard in shards]})
    names = f'shards-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json'
  if not _claimed(folder):
    files.make_folder(folder)
    if names:
      files.write_text(folder / names, text + '\n')
    files.write_json(folder / SPEC, spec.header() | {'shards': names})
  # Another worker's, if both were the first; its settings must be the same.
  found = check_claim(folder, spec)
  if found['shards'] == names:
    return [*shards]
  return _as_claimed(folder, found['shards'], shards)


def _claimed(folder: pathlib.Path) -> bool:
  """Whether a set was begun in a folder.

  Raises:
    UsageError: there is something else.
  """
  if bucket.is_bucket(os.fspath(folder)):
    there = {name.partition('/')[0] for name in files.tree(folder)}
  else:
    there = {*os.listdir(folder)} if folder.exists() else set()
  if SPEC in there:
    return True
  other = [name for name in there if name[0] != '.' and name[:7] != 'shards-']
  if other:
    raise UsageError(
      f'{folder} is not empty; choose another folder.', key='out'
    )
  return False


def check_claim(folder: pathlib.Path, spec: Spec) -> dict[str, Any]:
  """The spec of a folder as it was begun, which must be the same.

  Raises:
    UsageError: it is another; the message names what differs.
  """
  old = read_claim(folder)
  before, now = _flat(old), _flat(spec.header())
  keys = {key: None for key in (*now, *before) if key != 'shards'}
  wrong = [key for key in keys if before.get(key) != now.get(key)]
  if wrong:
    key = wrong[0]
    name = {'of': 'a number of images of'}.get(key, key)
    raise UsageError(
      f'{folder} holds a set prepared with {name} {short(before.get(key))!r}, '
      f'and this call has {short(now.get(key))!r}; choose another folder, or '
      'give all workers the same settings and version of imagen_jax.',
      key='out',
    )
  return old


def read_claim(folder: pathlib.Path) -> dict[str, Any]:
  """What `claim` wrote; raises DataError if there is none."""
  return files.read_json(
    folder / SPEC,
    error=DataError,
    version=FORMAT_VERSION,
    missing='give a folder in which imagen-prepare has begun a set',
  )


def claimed_shards(
  folder: pathlib.Path, header: Mapping[str, Any]
) -> list[Shard]:
  """The shards of a set, for which no data are needed.

  Args:
    folder: of the set.
    header: what `read_claim` gave.
  """
  if header['shards'] is None:
    return ranges_of(header['of'], header['part_size'])
  names = files.read_json(folder / header['shards'], error=DataError)['shards']
  return [Shard(i, name, name) for i, name in enumerate(names)]


def _as_claimed(
  folder: pathlib.Path, names: str, shards: Sequence[Shard]
) -> list[Shard]:
  """The shards as listed in a file, found where the present ones are."""
  now = {shard.name for shard in shards}
  root = (shards[0].path or '').removesuffix(shards[0].name)
  old = claimed_shards(folder, {'shards': names})
  if more := sorted(now - {shard.name for shard in old}):
    raise UsageError(
      f'{folder} was begun without {more[0]} ({len(more)} tars were added '
      'since); choose another folder, or give the path of the same tars.',
      key='out',
    )
  return [dataclasses.replace(s, path=f'{root}{s.name}') for s in old]


def _flat(header: Mapping[str, Any]) -> dict[str, Any]:
  """A header with its section flattened."""
  return {**header, 'settings': None, **header['settings']}
