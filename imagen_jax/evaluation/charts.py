"""Bar charts, line charts and confusion matrices in HTML, without scripts."""

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence

from imagen_jax.evaluation.scores import Score

COLOURS = ('#2563eb', '#ea580c', '#059669', '#9333ea', '#dc2626', '#0891b2')
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 298, 210, 48, 16, 40, 26  # of curves

# (x, y, (low, high) of y or None); x values that are text are evenly spaced, in
# order of appearance.
Point = tuple[float | str, float, tuple[float, float] | None]
Line = tuple[str, Sequence[Point]]  # (name, points)


@dataclasses.dataclass(frozen=True)
class Bar:
  """One accuracy of a bar chart.

  Attributes:
    name: label of the bar.
    score: {'accuracy', 'n', 'ci95'}.
    mark: a reference value in [0, 1], shown as a tick.
    control: whether it is a control, not a score of the model; shown in grey.
  """

  name: str
  score: Score
  mark: float | None = None
  control: bool = False


def bars(rows: Sequence[Bar]) -> str:
  """Accuracies as horizontal bars with their 95 % intervals."""
  width, height, left, right = 720, 30, 120, 150
  span, bottom = width - left - right, height * len(rows)
  parts = []
  for tick in (0, 0.25, 0.5, 0.75, 1):
    x = left + span * tick
    parts.append(
      f'<line class="rule" x1="{x}" x2="{x}" y1="0" y2="{bottom}"/>'
      f'<text class="tick" x="{x}" y="{bottom + 16}" '
      f'text-anchor="middle">{100 * tick:.0f} %</text>'
    )
  for i, bar in enumerate(rows):
    y, value = height * i + height / 2, bar.score['accuracy']
    a, b = (left + span * end for end in bar.score['ci95'])
    parts.append(
      f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">'
      f'{html.escape(bar.name)}</text>'
      f'<rect class="{"control" if bar.control else "bar"}" x="{left}" '
      f'y="{y - 9}" width="{max(span * value, 1):.1f}" height="18" rx="3"/>'
      f'<path class="whisker" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 4}v8'
      f'M{b:.1f} {y - 4}v8"/>'
    )
    if bar.mark is not None:
      x = left + span * bar.mark
      parts.append(
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 12}" '
        f'y2="{y + 12}"/>'
      )
    parts.append(
      f'<text x="{left + span + 14}" y="{y + 4}"><tspan class="value">'
      f'{100 * value:.1f} %</tspan>  <tspan class="tick">of {bar.score["n"]}'
      f'</tspan></text>'
    )
  return _svg(width, bottom + 24, parts)


@dataclasses.dataclass(frozen=True)
class _Axes:
  """The axes of a line chart.

  Attributes:
    place: {x: its coordinate}; text is numbered from 0.
    xs, ys: ticks, {coordinate: label}.
  """

  place: dict[float | str, float]
  xs: dict[float, str]
  ys: dict[float, str]

  def at(self, x: float, y: float) -> tuple[float, float]:
    """Pixel coordinates of a point, y downwards."""
    low, high = (pick([*self.xs, *self.place.values()]) for pick in (min, max))
    bottom, top = min(self.ys), max(self.ys)
    along = (x - low) / ((high - low) or 1)
    up = (y - bottom) / ((top - bottom) or 1)
    return (
      LEFT + (WIDTH - LEFT - RIGHT) * along,
      HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * up,
    )


def _axes(lines: Sequence[Line], percent: bool) -> _Axes:
  names = list(dict.fromkeys(x for _, line in lines for x, *_ in line))
  values = [y for _, line in lines for _, y, _ in line]
  if any(isinstance(x, str) for x in names):
    place = {x: float(i) for i, x in enumerate(names)}
    xs = {float(i): str(x) for i, x in enumerate(names)}
  else:
    place = {x: float(x) for x in names}
    ends = min(place.values()), max(place.values())
    xs = {x: f'{x:g}' for x in _ticks(*ends)}
  if percent:
    ys = {y: f'{100 * y:.0f} %' for y in (0.0, 0.25, 0.5, 0.75, 1.0)}
  else:
    ys = {y: f'{y:g}' for y in _ticks(min(values), max(values))}
  return _Axes(place, xs, ys)


def curves(
  lines: Sequence[Line],
  title: str,
  names: tuple[str, str],
  percent: bool = False,
) -> str:
  """A line chart.

  Args:
    lines: at least one.
    title: of the chart.
    names: of x and y.
    percent: whether the y axis is 0 to 100 %.
  """
  axes = _axes(lines, percent)
  parts = [
    f'<text class="value" x="{LEFT}" y="14">{html.escape(title)}</text>',
    *_grid(axes, names[0]),
  ]
  for i, (_, line) in enumerate(lines):
    parts += _curve(axes, line, names, COLOURS[i % len(COLOURS)])
  return _svg(WIDTH, HEIGHT, parts)


def _grid(axes: _Axes, name: str) -> Iterable[str]:
  for y, label in axes.ys.items():
    _, v = axes.at(0.0, y)
    yield (
      f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" '
      f'y2="{v:.1f}"/><text class="tick" x="{LEFT - 6}" y="{v + 4:.1f}" '
      f'text-anchor="end">{label}</text>'
    )
  for x, label in axes.xs.items():
    u, _ = axes.at(x, 0.0)
    yield (
      f'<text class="tick" x="{u:.1f}" y="{HEIGHT - BOTTOM + 16}" '
      f'text-anchor="middle">{html.escape(label)}</text>'
    )
  yield (
    f'<text class="tick" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" '
    f'text-anchor="middle">{html.escape(name)}</text>'
  )


def _curve(
  axes: _Axes, line: Sequence[Point], names: tuple[str, str], colour: str
) -> Iterable[str]:
  points = [axes.at(axes.place[x], y) for x, y, _ in line]
  path = ' '.join(f'{u:.1f},{v:.1f}' for u, v in points)
  yield (
    f'<polyline points="{path}" fill="none" stroke="{colour}" '
    'stroke-width="2"/>'
  )
  for (u, v), (x, y, ends) in zip(points, line):
    if ends:
      a, b = (axes.at(0.0, end)[1] for end in ends)
      yield (
        f'<line x1="{u:.1f}" x2="{u:.1f}" y1="{a:.1f}" y2="{b:.1f}" '
        f'stroke="{colour}" opacity=".45"/>'
      )
    title = html.escape(f'{names[0]} {x}: {names[1]} {y:.4g}')
    yield (
      f'<circle cx="{u:.1f}" cy="{v:.1f}" r="3.2" fill="{colour}">'
      f'<title>{title}</title></circle>'
    )


def legend(names: Iterable[str]) -> str:
  """The legend of `curves` with lines of these names."""
  return ''.join(
    f'<span class="key"><i style="background:{COLOURS[i % len(COLOURS)]}"></i>'
    f'{html.escape(name)}</span>'
    for i, name in enumerate(names)
  )


def matrix(counts: Mapping[str, Mapping[str, int]], title: str) -> str:
  """A confusion matrix: rows are what was prompted, columns what was seen.

  Args:
    counts: {prompted: {seen: count}}; a cell's shade is its fraction of a row.
    title: of the table.
  """
  said = sorted(counts)
  seen = said + sorted({x for row in counts.values() for x in row} - set(said))
  rows = []
  for a in said:
    total = sum(counts[a].values())
    cells = [f'<th>{html.escape(a)}</th>']
    for b in seen:
      n = counts[a].get(b, 0)
      tone = '5,150,105' if a == b else '220,38,38'
      depth = 0.12 + 0.75 * n / total if n else 0
      hint = html.escape(f'{a} seen as {b}: {n} of {total}')
      cells.append(
        f'<td style="background:rgba({tone},{depth:.2f})" title="{hint}">'
        f'{n or ""}</td>'
      )
    rows.append(f'<tr>{"".join(cells)}</tr>')
  head = ''.join(f'<th><span>{html.escape(b)}</span></th>' for b in seen)
  return (
    f'<table class="matrix"><caption>{html.escape(title)}</caption>'
    f'<tr><th></th>{head}</tr>{"".join(rows)}</table>'
  )


def _ticks(low: float, high: float) -> tuple[float, ...]:
  """About four round numbers that enclose [low, high]."""
  span = (high - low) or abs(high) or 1
  step = 10.0 ** math.floor(math.log10(span / 3))
  step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 4)
  first, last = math.floor(low / step), math.ceil(high / step)
  if first == last:
    last += 1
  return tuple(round(i * step, 10) for i in range(first, last + 1))


def _svg(width: int, height: int, parts: Iterable[str]) -> str:
  return (
    f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    f'role="img">{"".join(parts)}</svg>'
  )
