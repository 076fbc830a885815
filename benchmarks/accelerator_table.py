"""The rows of `accelerator.py` as Markdown."""

from collections.abc import Mapping

from accelerator_trace import CLASSES

# {kind of row: the table's header}; the first column is the row's work.
HEADERS = {
  'train': (
    'training step', 'images/s', 'MFU', 'HFU', 'ms, median', 'GiB',
    'compiled in',
  ),
  'ops': ('of which', 'ms', *CLASSES, 'busy'),
  'sample': (
    'sampling', 'images', 's/evaluation', 'steps', 's/image', 'GiB',
    'compiled in',
  ),
  'deepfloyd': ('DeepFloyd IF', 's/image', 'ours ÷ theirs', 'ready in'),
  't5': ('text encoder', 'captions/s', 'MFU', 'ms, median', 'compiled in'),
  'determinism': ('two runs', 'equal to the bit', 'first that differs'),
}  # fmt: skip
OURS = 'imagen_jax'


def table(rows: Mapping[str, Mapping]) -> str:
  """All rows, one table for each kind of row."""
  parts = []
  for kind, header in HEADERS.items():
    lines = _lines(kind, rows, len(header))
    if lines:
      rule = '|'.join(['---'] * len(header))
      parts.append('\n'.join([_line(header), f'|{rule}|', *lines]))
  return '\n\n'.join(parts)


def _lines(kind: str, rows: Mapping[str, Mapping], width: int) -> list[str]:
  """The lines of a kind's table."""
  lines = []
  for row in rows.values():
    if kind == 'ops' and 'ops' in row:
      row = {'work': row['work'], **row['ops']}
    elif kind != row['kind']:
      continue
    if 'left_out' in row:
      cells = [f'left out: {row["left_out"]}'.replace('|', '/')]
    else:
      cells = _CELLS[kind](row, rows)
    cells += [''] * (width - 1 - len(cells))
    lines.append(_line([row['work'], *cells]))
  return lines


def _line(cells: list[str] | tuple[str, ...]) -> str:
  return f'| {" | ".join(cells)} |'


def _train(row: Mapping, rows: Mapping) -> list[str]:
  rate = row['batch'] / row['seconds']
  return [
    _number(rate), _percent(row['mfu']), _percent(row['hfu']),
    _number(1e3 * row['seconds']), _number(row['gib']), _compiled(row),
  ]  # fmt: skip


def _ops(row: Mapping, rows: Mapping) -> list[str]:
  whole = sum(row['seconds'].values())
  fractions = [_percent(row['seconds'][name] / whole) for name in CLASSES]
  return [_number(1e3 * whole), *fractions, _percent(row['busy'])]


def _sample(row: Mapping, rows: Mapping) -> list[str]:
  each = row['call'] + row['steps'] * row['evaluation']
  return [
    str(row['batch']), _number(row['evaluation']), str(row['steps']),
    _number(each / row['batch']), _number(row['gib']), _compiled(row),
  ]  # fmt: skip


def _deepfloyd(row: Mapping, rows: Mapping) -> list[str]:
  ours = next(
    (
      other
      for other in rows.values()
      if other['kind'] == 'deepfloyd' and other.get('who') == OURS
    ),
    {},
  )
  ratio = ''
  if 'seconds' in ours and row['who'] != OURS:
    own = ours['seconds'] / ours['batch']
    ratio = f'**{own / (row["seconds"] / row["batch"]):.2f}**'
  return [_number(row['seconds'] / row['batch']), ratio, _compiled(row)]


def _t5(row: Mapping, rows: Mapping) -> list[str]:
  return [
    _number(row['batch'] / row['seconds']), _percent(row['mfu']),
    _number(1e3 * row['seconds']), _compiled(row),
  ]  # fmt: skip


def _determinism(row: Mapping, rows: Mapping) -> list[str]:
  first, second = row['runs']
  pairs = enumerate(zip(first, second), 1)
  differs = next((f'step {i}' for i, (a, b) in pairs if a != b), '')
  return ['no' if differs else 'yes', differs]


_CELLS = {
  'train': _train,
  'ops': _ops,
  'sample': _sample,
  'deepfloyd': _deepfloyd,
  't5': _t5,
  'determinism': _determinism,
}


def _number(x: float) -> str:
  """Three digits, or all before the point."""
  if x >= 100:
    return f'{x:,.0f}'
  return f'{x:.1f}' if x >= 10 else f'{x:.2f}' if x >= 1 else f'{x:.3g}'


def _percent(x: float | None) -> str:
  return '' if x is None else f'{100 * x:.1f} %'


def _compiled(row: Mapping) -> str:
  """Seconds of compiling; a program from the cache took none."""
  cached = ', from the cache' if row.get('cached') else ''
  return f'{row["compile"]:.0f} s{cached}'
