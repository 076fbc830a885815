r"""Plots a sweep of evaluate.py: a Markdown table and a stand-alone SVG.

  python evaluate.py --suite shapes --stages base,sr1 --num 16 --out runs/s \
      --sweep base.sampler=ddpm,ddim,dpmpp --sweep base.steps=4,8,16,32,64
  python benchmarks/plot_sweep.py runs/s --out docs/results/steps.svg

Categories are pooled: the fraction of all images that are correct, with its
Wilson 95 % interval. The last swept setting is the horizontal axis, the others
are the lines.
"""

import argparse
import html
import pathlib

from imagen_jax.evaluation import charts, scores
from imagen_jax.evaluation.sweep_report import value

SUITES = ('shapes', 'shapes_from_truth')
CONTROLS = ('shuffled', 'judge')
STYLE = (
  'text{font:11px system-ui,sans-serif;fill:#111827}.tick{fill:#6b7280}'
  '.value{font-weight:600}.rule{stroke:#e5e7eb}'
)


def read(folder, categories):
  """({line: {x: (correct, n)}}, name of the axis), in the order of the runs."""
  found, axis = {}, None
  for suite, score in scores.read_scores(folder).items():
    name, _, sweep = suite.partition('@')
    if name not in SUITES or not sweep:
      continue
    *others, (axis, x) = [part.split('=') for part in sweep.split(',')]
    kept = [
      s
      for category, s in score.items()
      if (category in categories if categories else category not in CONTROLS)
    ]
    correct = sum(round(s['accuracy'] * s['n']) for s in kept)
    line = ', '.join(value for _, value in others)
    found.setdefault(line, {})[x] = correct, sum(s['n'] for s in kept)
  return found, axis


def table(found, axis):
  """Markdown: a row for each value of the axis, a column for each line."""
  yield f'| {axis} | ' + ' | '.join(line or 'accuracy' for line in found) + ' |'
  yield '|---' * (1 + len(found)) + '|'
  for x in dict.fromkeys(x for line in found.values() for x in line):
    counts = [line.get(x, (0, 0)) for line in found.values()]
    cells = [scores.cell([True] * r + [False] * (n - r)) for r, n in counts]
    yield f'| {x} | ' + ' | '.join(cells) + ' |'


def chart(found, axis, title):
  """The SVG, with a legend below the curves."""
  lines = [
    (name, [(value(x), r / n, scores.wilson(r, n)) for x, (r, n) in points])
    for name, points in ((k, v.items()) for k, v in found.items())
  ]
  svg = charts.curves(lines, title, (axis, 'accuracy'), percent=True)
  inside = svg[svg.index('>') + 1 : svg.rindex('<')]
  keys = ''.join(
    f'<circle cx="{54 + 82 * i}" cy="218" r="4" fill="{charts.COLOURS[i]}"/>'
    f'<text x="{62 + 82 * i}" y="222">{html.escape(name)}</text>'
    for i, (name, _) in enumerate(lines)
    if name
  )
  return (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 298 230" width="596">'
    f'<style>{STYLE}</style><rect width="298" height="230" fill="#fff"/>'
    f'{inside}{keys}</svg>\n'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('report', help='folder with scores.json')
  parser.add_argument('--categories', help='of these only, such as pair,fill')
  parser.add_argument('--title', default='accuracy')
  parser.add_argument('--out', help='the SVG')
  args = parser.parse_args()
  found, axis = read(
    args.report, args.categories and args.categories.split(',')
  )
  if not found:
    raise SystemExit(f'{args.report} holds no sweep of suite shapes')
  print('\n'.join(table(found, axis)))
  if args.out:
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(chart(found, axis, args.title), encoding='utf-8')


if __name__ == '__main__':
  main()
