"""Bar charts, line charts and confusion matrices in HTML, without scripts."""

import dataclasses
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from imagen_jax.evaluation.scores import Score

COLOURS = ('#2563eb', '#ea580c', '#059669', '#9333ea', '#dc2626', '#0891b2')
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 298, 210, 48, 16, 40, 26  # of curves
PERCENT = {y: f'{100 * y:.0f} %' for y in (0.0, 0.25, 0.5, 0.75, 1.0)}

# (x, y, (low, high) of y or None); x values that are text are evenly spaced, in
# order of appearance.
Value = float | str
Point = tuple[Value, float, tuple[float, float] | None]
Line = tuple[str, Sequence[Point]]  # (name, points)
Pair = tuple[float, float]


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
  for tick, label in PERCENT.items():
    x = left + span * tick
    parts.append(_line((x, x), (0, bottom), 'class="rule"'))
    parts.append(_text(x, bottom + 16, label))
  for i, bar in enumerate(rows):
    y, value = height * i + height / 2, bar.score['accuracy']
    a, b = (left + span * end for end in bar.score['ci95'])
    parts += [
      _text(left - 10, y + 4, bar.name, anchor='end', style=''),
      f'<rect class="{"control" if bar.control else "bar"}" x="{left}" '
      f'y="{y - 9}" width="{max(span * value, 1):.1f}" height="18" rx="3"/>',
      f'<path class="whisker" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 4}v8'
      f'M{b:.1f} {y - 4}v8"/>',
    ]
    if bar.mark is not None:
      x = left + span * bar.mark
      parts.append(_line((x, x), (y - 12, y + 12), 'class="mark"'))
    parts.append(
      f'<text x="{left + span + 14}" y="{y + 4}"><tspan class="value">'
      f'{100 * value:.1f} %</tspan>  <tspan class="tick">of {bar.score["n"]}'
      '</tspan></text>'
    )
  return _svg(width, bottom + 24, parts)


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
  points = [point for _, line in lines for point in line]
  right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
  xs, x_at = _axis([x for x, _, _ in points], (LEFT, right))
  ys, y_at = _axis([y for _, y, _ in points], (bottom, TOP), percent)
  parts = [_text(LEFT, 14, title, anchor='start', style='value')]
  for y, label in ys.items():
    v = y_at(y)
    parts.append(_line((LEFT, right), (v, v), 'class="rule"'))
    parts.append(_text(LEFT - 6, v + 4, label, anchor='end'))
  parts += [_text(x_at(x), bottom + 16, label) for x, label in xs.items()]
  parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 6, names[0]))
  for i, (_, line) in enumerate(lines):
    colour = COLOURS[i % len(COLOURS)]
    path = ' '.join(f'{x_at(x):.1f},{y_at(y):.1f}' for x, y, _ in line)
    parts.append(
      f'<polyline points="{path}" fill="none" stroke="{colour}" '
      'stroke-width="2"/>'
    )
    for x, y, ends in line:
      u, v, hint = x_at(x), y_at(y), f'{names[0]} {x}: {names[1]} {y:.4g}'
      if ends:
        low, high = map(y_at, ends)
        look = f'stroke="{colour}" opacity=".45"'
        parts.append(_line((u, u), (low, high), look))
      parts.append(
        f'<circle cx="{u:.1f}" cy="{v:.1f}" r="3.2" fill="{colour}">'
        f'<title>{html.escape(hint)}</title></circle>'
      )
  return _svg(WIDTH, HEIGHT, parts)


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


def _axis(
  values: Sequence[Value], pixels: Pair, percent: bool = False
) -> tuple[Mapping[Value, str], Callable[[Value], float]]:
  """({tick: label}, value -> coordinate) of an axis between two pixels."""
  labels: dict[Value, str]
  if any(isinstance(value, str) for value in values):
    labels = {value: str(value) for value in values}
    number: Callable[[Value], float] = list(labels).index
    low, high = 0.0, len(labels) - 1.0
  else:
    numbers = [float(value) for value in values]
    ticks = [*PERCENT] if percent else _ticks(min(numbers), max(numbers))
    labels = {x: PERCENT[x] if percent else f'{x:g}' for x in ticks}
    number, low, high = float, ticks[0], ticks[-1]
  start, end = pixels
  scale = (end - start) / ((high - low) or 1)
  return labels, lambda value: start + scale * (number(value) - low)


def _ticks(low: float, high: float) -> tuple[float, ...]:
  """About four round numbers that enclose [low, high]."""
  span = (high - low) or abs(high) or 1
  step = 10.0 ** math.floor(math.log10(span / 3))
  step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 4)
  first, last = math.floor(low / step), math.ceil(high / step)
  last = max(last, first + 1)
  return tuple(round(i * step, 10) for i in range(first, last + 1))


def _text(
  x: float, y: float, text: str, anchor: str = 'middle', style: str = 'tick'
) -> str:
  return (
    f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
    f'{html.escape(text)}</text>'
  )


def _line(x: Pair, y: Pair, look: str) -> str:
  return (
    f'<line {look} x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y[0]:.1f}" '
    f'y2="{y[1]:.1f}"/>'
  )


def _svg(width: int, height: int, parts: Iterable[str]) -> str:
  return (
    f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    f'role="img">{"".join(parts)}</svg>'
  )
