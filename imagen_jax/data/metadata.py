"""Tables of metadata: JSON Lines, CSV or Parquet, on a disk or in a bucket."""

import csv
import io
import os
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from imagen_jax.errors import DataError, UsageError
from imagen_jax.io import bucket, files
from imagen_jax.io.files import AnyPath

SUFFIXES = ('.jsonl', '.csv', '.parquet')
# Where captions are looked for if no column is named.
CAPTION_KEYS = ('text', 'caption', 'captions')
FIX = 'correct or remove it'


class Table(NamedTuple):
  """A table.

  Attributes:
    columns: their names.
    rows: ('line 3', {column: value}) of each row; a column may be missing.
  """

  columns: list[str]
  rows: list[tuple[str, dict[str, Any]]]


def read(file: AnyPath, columns: Collection[str] | None = None) -> Table:
  """Reads a table.

  Args:
    file: whose suffix, of `SUFFIXES`, tells the format.
    columns: those that are needed, which saves time with Parquet; None: all.

  Raises:
    DataError: it is missing or broken; names the line.
    UsageError: it is Parquet, for which a library is missing.
  """
  suffix = os.path.splitext(os.fspath(file))[1]
  try:
    data = bucket.at(file).read_bytes()
  except OSError as error:
    raise DataError(f'{file} cannot be read ({error}).') from error
  if suffix == '.parquet':
    return _parquet(file, data, columns)
  rows = [*(_csv if suffix == '.csv' else _lines)(file, data)]
  names = dict.fromkeys(name for _, row in rows for name in row)
  return Table([*names], rows)


def _lines(file: AnyPath, data: bytes) -> Iterator[tuple[str, dict]]:
  data = data.removeprefix(b'\xef\xbb\xbf')
  for number, line in enumerate(data.split(b'\n'), start=1):
    if not line.strip():
      continue
    try:
      row = files.parse_json(line)
    except ValueError as error:
      raise DataError(
        f'{file}, line {number}, is no JSON ({error}); {FIX}.'
      ) from error
    if not isinstance(row, dict):
      raise DataError(f'{file}, line {number}, is no JSON object; {FIX}.')
    yield f'line {number}', row


def _csv(file: AnyPath, data: bytes) -> Iterator[tuple[str, dict]]:
  try:
    # Excel begins a file with a byte order mark.
    text = io.StringIO(data.decode('utf-8-sig'), newline='')
  except UnicodeDecodeError as error:
    raise DataError(f'{file} is not UTF-8; save it as UTF-8.') from error
  reader = csv.DictReader(text, strict=True)
  try:
    for row in reader:
      if None in row:
        raise csv.Error('it has more fields than the first line')
      yield f'line {reader.line_num}', row
  except csv.Error as error:
    raise DataError(
      f'{file}, line {reader.line_num}, is no CSV ({error}); {FIX}.'
    ) from error


def _parquet(
  file: AnyPath, data: bytes, columns: Collection[str] | None
) -> Table:
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise UsageError(
      f'{file} needs a package that is not installed ({error.name}): pip '
      "install 'imagen_jax[parquet]'."
    ) from error
  try:
    table = parquet.ParquetFile(io.BytesIO(data))
    names = table.schema_arrow.names
    chosen = [n for n in names if columns is None or n in columns]
    rows = table.read(columns=chosen).to_pylist()
  except (pyarrow.ArrowException, OSError, ValueError) as error:
    raise DataError(
      f'{file} cannot be read as Parquet ({error}); {files.COPY_AGAIN}.'
    ) from error
  return Table(names, [(f'row {i}', row) for i, row in enumerate(rows)])


def captions(
  row: dict[str, Any], columns: Collection[str] | None
) -> list[Any] | None:
  """The values of a row that are captions; None if it has no such column.

  Args:
    row: {column: value}; a value may be a list of captions.
    columns: with captions; None: the first that there is of `CAPTION_KEYS`.
  """
  if columns is None:
    columns = [key for key in CAPTION_KEYS if key in row][:1]
  if not any(key in row for key in columns):
    return None
  values = [row.get(key) for key in columns]
  return [
    text
    for value in values
    for text in (value if isinstance(value, list | tuple) else [value])
  ]


def check_columns(
  wanted: Collection[str], columns: Collection[str], place: Any
) -> None:
  """Raises UsageError if a column that `data.captions` names is missing."""
  for name in wanted:
    if name not in columns:
      raise UsageError(
        f'data.captions has {name}, and {place} has no such column; it has '
        f'{", ".join(columns) or "none"}.',
        key='config.data.captions',
      )
