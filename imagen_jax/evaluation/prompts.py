"""Reads lists of prompts in the formats of common benchmarks.

  .csv    DrawBench: columns Prompt, Category
  .tsv    PartiPrompts: columns Prompt, Category, …
  .jsonl  GenEval: objects with "prompt" and "tag"; or with "category"
  .txt    one prompt per line, no categories

The project ships none of these files.
"""

import csv
import io
import os
import pathlib
from typing import Any

from imagen_jax.errors import DataError
from imagen_jax.io import files

ALL = 'all'  # the category of prompts without one


def read_prompts(path: str | os.PathLike) -> list[tuple[str, str]]:
  """[(category, prompt)] of a file, in order.

  Args:
    path: a file, whose suffix selects the format.

  Raises:
    DataError: it cannot be read, or holds no prompt; the message names the
      line or the missing column.
  """
  path = pathlib.Path(path)
  readers = {
    '.csv': lambda text: _table(path, text),
    # Quotes have no meaning there.
    '.tsv': lambda text: _table(
      path, text, delimiter='\t', quoting=csv.QUOTE_NONE
    ),
    '.jsonl': lambda text: _objects(path, text),
    '.txt': lambda text: [(ALL, line) for line in text.split('\n')],
  }
  if path.suffix not in readers:
    raise DataError(
      f'{path} is no list of prompts; give a {", ".join(readers)} file.'
    )
  text = files.read_text(path, advice='give a UTF-8 file of prompts')
  try:
    rows = readers[path.suffix](text)
  except csv.Error as error:
    raise DataError(
      f'{path} is no table ({error}); give a file of prompts.'
    ) from error
  found = [
    (' '.join(category.split()) or ALL, ' '.join(prompt.split()))
    for category, prompt in rows
    if prompt.strip()
  ]
  if not found:
    raise DataError(f'{path} holds no prompt; give a file of prompts.')
  return found


def _table(
  path: pathlib.Path, text: str, **options: Any
) -> list[tuple[str, str]]:
  rows = csv.DictReader(io.StringIO(text), **options)
  columns = {name.strip().lower(): name for name in rows.fieldnames or ()}
  if 'prompt' not in columns:
    raise DataError(
      f'{path} has no column Prompt but {", ".join(columns) or "nothing"}; '
      'name the columns in the first line.'
    )
  category = columns.get('category', '')
  found = []
  for row in rows:
    if None in row:
      raise DataError(
        f'{path}, line {rows.line_num}, has more fields than columns; put a '
        'prompt with commas in quotes.'
      )
    found.append((row.get(category) or ALL, row[columns['prompt']] or ''))
  return found


def _objects(path: pathlib.Path, text: str) -> list[tuple[str, str]]:
  found = []
  for number, line in enumerate(text.split('\n'), start=1):
    if not line.strip():
      continue
    try:
      row = files.parse_json(line)
      category = row.get('tag', row.get('category', ALL))
      if not isinstance(row['prompt'], str) or not isinstance(category, str):
        raise TypeError('not strings')
      row['prompt'].encode()  # JSON can hold lone surrogates
      found.append((category, row['prompt']))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise DataError(
        f'{path}, line {number}, is no JSON object with the text "prompt"; '
        'correct or remove the line.'
      ) from error
  return found
