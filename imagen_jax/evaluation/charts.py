"""Bars, curves and matrices as pieces of HTML, with no script in them."""

import html
import math

COLOURS = ('#2563eb', '#ea580c', '#059669', '#9333ea', '#dc2626', '#0891b2')


def bars(rows):
  """Scores as horizontal bars with their 95 % intervals.

  Args:
    rows: [(name, {'accuracy', 'n', 'ci95'}, mark or None, is_control)], the
      mark being another fraction in [0, 1], shown as a tick.
  """
  width, height, left, right = 720, 30, 120, 150
  span = width - left - right
  parts = []
  for fraction in (0, 0.25, 0.5, 0.75, 1):
    x = left + span * fraction
    parts.append(
      f'<line class="rule" x1="{x}" x2="{x}" y1="0" y2="{height * len(rows)}"/>'
      f'<text class="tick" x="{x}" y="{height * len(rows) + 16}" '
      f'text-anchor="middle">{100 * fraction:.0f} %</text>'
    )
  for i, (name, score, mark, control) in enumerate(rows):
    y, value = height * i + height / 2, score['accuracy']
    low, high = score['ci95']
    a, b = left + span * low, left + span * high
    parts.append(
      f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">'
      f'{html.escape(name)}</text>'
      f'<rect class="{"control" if control else "bar"}" x="{left}" y="{y - 9}" '
      f'width="{max(span * value, 1):.1f}" height="18" rx="3"/>'
      f'<path class="whisker" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 4}v8'
      f'M{b:.1f} {y - 4}v8"/>'
    )
    if mark is not None:
      x = left + span * mark
      parts.append(
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 12}" '
        f'y2="{y + 12}"/>'
      )
    parts.append(
      f'<text x="{left + span + 14}" y="{y + 4}"><tspan class="value">'
      f'{100 * value:.1f} %</tspan>  <tspan class="tick">of {score["n"]}'
      f'</tspan></text>'
    )
  return _svg(width, height * len(rows) + 24, parts)


def curves(lines, *, title, across, up, percent=False):
  """Lines through points, as one chart.

  Args:
    lines: [(name, [(x, y, (low, high) or None)])]; an x that is text stands
      at its place in the list.
    title, across, up: of the chart and its axes.
    percent: the y axis is 0 to 100 %.
  """
  width, height, left, bottom, top = 298, 210, 48, 40, 26
  words = any(isinstance(x, str) for _, line in lines for x, *_ in line)
  names = list(dict.fromkeys(x for _, line in lines for x, *_ in line))
  place = {x: (names.index(x) if words else x) for x in names}
  xs = _ticks(min(place.values()), max(place.values()))
  values = [y for _, line in lines for _, y, _ in line]
  ys = (0, 0.25, 0.5, 0.75, 1) if percent else _ticks(min(values), max(values))
  if words:
    xs = tuple(range(len(names)))
  low_x = min(xs[0], min(place.values()))
  high_x = max(xs[-1], max(place.values()))

  def at(x, y):
    fraction = (x - low_x) / ((high_x - low_x) or 1)
    rise = (y - ys[0]) / ((ys[-1] - ys[0]) or 1)
    return (
      left + (width - left - 16) * fraction,
      height - bottom - (height - bottom - top) * rise,
    )

  parts = [f'<text class="value" x="{left}" y="14">{html.escape(title)}</text>']
  for y in ys:
    _, v = at(low_x, y)
    label = f'{100 * y:.0f} %' if percent else f'{y:g}'
    parts.append(
      f'<line class="rule" x1="{left}" x2="{width - 16}" y1="{v:.1f}" '
      f'y2="{v:.1f}"/><text class="tick" x="{left - 6}" y="{v + 4:.1f}" '
      f'text-anchor="end">{label}</text>'
    )
  for x in xs:
    u, _ = at(x, ys[0])
    label = names[x] if words else f'{x:g}'
    parts.append(
      f'<text class="tick" x="{u:.1f}" y="{height - bottom + 16}" '
      f'text-anchor="middle">{html.escape(str(label))}</text>'
    )
  parts.append(
    f'<text class="tick" x="{(left + width) / 2}" y="{height - 6}" '
    f'text-anchor="middle">{html.escape(across)}</text>'
  )
  for i, (_, line) in enumerate(lines):
    colour = COLOURS[i % len(COLOURS)]
    points = [at(place[x], y) for x, y, _ in line]
    path = ' '.join(f'{u:.1f},{v:.1f}' for u, v in points)
    parts.append(
      f'<polyline points="{path}" fill="none" stroke="{colour}" '
      'stroke-width="2"/>'
    )
    for (u, v), (x, y, ends) in zip(points, line):
      if ends:
        a, b = at(place[x], ends[0])[1], at(place[x], ends[1])[1]
        parts.append(
          f'<line x1="{u:.1f}" x2="{u:.1f}" y1="{a:.1f}" y2="{b:.1f}" '
          f'stroke="{colour}" opacity=".45"/>'
        )
      parts.append(
        f'<circle cx="{u:.1f}" cy="{v:.1f}" r="3.2" fill="{colour}">'
        f'<title>{html.escape(f"{across} {x}: {up} {y:.4g}")}</title></circle>'
      )
  return _svg(width, height, parts)


def legend(names):
  """The colours of the lines of `curves`."""
  return ''.join(
    f'<span class="key"><i style="background:{COLOURS[i % len(COLOURS)]}"></i>'
    f'{html.escape(name)}</span>'
    for i, name in enumerate(names)
  )


def matrix(counts, title):
  """A confusion matrix: said down, seen across, fractions of each row.

  Args:
    counts: {(said, seen): count}.
    title: of the table.
  """
  said = sorted({a for a, _ in counts})
  seen = said + sorted({b for _, b in counts} - set(said))
  rows = []
  for a in said:
    total = sum(n for (x, _), n in counts.items() if x == a)
    cells = [f'<th>{html.escape(a)}</th>']
    for b in seen:
      n = counts.get((a, b), 0)
      tone = '5,150,105' if a == b else '220,38,38'
      depth = 0.12 + 0.75 * n / total if n else 0
      told = html.escape(f'{a} seen as {b}: {n} of {total}')
      cells.append(
        f'<td style="background:rgba({tone},{depth:.2f})" title="{told}">'
        f'{n or ""}</td>'
      )
    rows.append(f'<tr>{"".join(cells)}</tr>')
  head = ''.join(f'<th><span>{html.escape(b)}</span></th>' for b in seen)
  return (
    f'<table class="matrix"><caption>{html.escape(title)}</caption>'
    f'<tr><th></th>{head}</tr>{"".join(rows)}</table>'
  )


def _ticks(low, high):
  """About four round numbers that enclose [low, high]."""
  span = (high - low) or abs(high) or 1
  step = 10 ** math.floor(math.log10(span / 3))
  step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 4)
  first, last = math.floor(low / step), math.ceil(high / step)
  if first == last:
    last += 1
  return tuple(round(i * step, 10) for i in range(first, last + 1))


def _svg(width, height, parts):
  return (
    f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    f'role="img">{"".join(parts)}</svg>'
  )
