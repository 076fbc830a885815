"""The report's section of a sweep: curves, then images side by side."""

import html
import pathlib
import typing
from collections.abc import Iterator, Sequence

from imagen_jax.evaluation import charts, page
from imagen_jax.evaluation.charts import Line
from imagen_jax.evaluation.generation import read_records
from imagen_jax.evaluation.scores import Categories, Score

FRACTIONS = ('accuracy', 'precision', 'recall')
NO_CURVE = ('n', 'n_real', 'ci95', 'judge', 'kid_sd')
ROWS, COLUMNS = 4, 8  # prompts and runs whose images are shown

Curves = dict[str, list[tuple[float | str, Categories]]]


def parts(label: str) -> list[tuple[str, str]]:
  """'fid@a=1,b=2' as [('a', '1'), ('b', '2')]."""
  text = label.partition('@')[2]
  return [(k, v) for k, _, v in (x.partition('=') for x in text.split(','))]


def keys(label: str) -> tuple[str, ...]:
  """The keys of a label's sweep, ('a', 'b')."""
  return tuple(key for key, _ in parts(label))


def sweep_section(
  out: pathlib.Path,
  title: str,
  labels: Sequence[str],
  found: dict[str, Categories],
  notes: dict[str, typing.Any],
) -> Iterator[str]:
  """The section of all runs of a sweep; its last key is the x axis."""
  axis = keys(labels[0])[-1]
  curves: Curves = {}
  for label in labels:
    *others, (_, x) = parts(label)
    name = ', '.join(f'{k} {v}' for k, v in others) or label.partition('@')[0]
    curves.setdefault(name, []).append((value(x), found[label]))
  yield f'<h2>{html.escape(f"{title} By {axis}")}</h2>'
  if len(curves) > 1:
    yield f'<p>{charts.legend(curves)}</p>'
  categories = dict.fromkeys(c for label in labels for c in found[label])
  yield page.cards(
    (
      chart
      for name in categories
      for chart in _charts(name, found[labels[0]].get(name, {}), curves, axis)
    ),
    row=True,
  )
  yield page.cards([_images(out, labels, notes)])
  yield page.provenance(notes[labels[0]])


def _charts(
  category: str, first: Score, curves: Curves, axis: str
) -> Iterator[str]:
  """The charts of a category, one per number.

  If it has both, the trade-off of Figure 4 comes first: the Fréchet distance
  against the CLIP score.
  """

  def lines(x_key: str | None, y_key: str) -> list[Line]:
    """Lines of one number over the swept values, or over another number."""
    return [
      (
        name,
        [
          (s[x_key] if x_key else x, s[y_key], _ends(s, y_key))
          for x, categories in curve
          if (s := categories.get(category))
        ],
      )
      for name, curve in curves.items()
    ]

  if {'frechet', 'clip_score'} <= first.keys():
    title = 'Fréchet distance against CLIP score'
    names = ('CLIP score', 'Fréchet distance')
    yield charts.curves(lines('clip_score', 'frechet'), title, names)
  for key in (k for k in first if k not in NO_CURVE):
    yield charts.curves(
      lines(None, key),
      category if key in ('accuracy', 'mean') else key,
      (axis, key),
      percent=key in FRACTIONS,
    )


def _ends(score: Score, key: str) -> tuple[float, float] | None:
  if key != 'accuracy':  # else the axis may not enclose the interval
    return None
  low, high = score['ci95']
  return low, high


def value(text: str) -> float | str:
  """A swept value, as a number if it is one."""
  try:
    return float(text)
  except ValueError:
    return text


def _images(
  out: pathlib.Path, labels: Sequence[str], notes: dict[str, typing.Any]
) -> str:
  """A table of images: one row for each prompt, one column for each run."""
  folders = {x: out / notes[x]['run'] for x in labels[:COLUMNS]}
  records = {x: read_records(folder) for x, folder in folders.items()}
  every = sorted(records[labels[0]])
  chosen = [k for k in every if k[1] == 0][:ROWS] or every[:ROWS]
  head = ''.join(
    f'<th>{html.escape(x.partition("@")[2])}</th>' for x in folders
  )
  body = ''
  for key in chosen:
    cells = ''.join(
      f'<td style="width:130px">{page.figure(folder, records[x][key], False)}'
      '</td>'
      for x, folder in folders.items()
      if key in records[x]
    )
    prompt = html.escape(records[labels[0]][key]['prompt'])
    body += f'<tr><td style="width:140px">{prompt}</td>{cells}</tr>'
  return f'<table><tr><th></th>{head}</tr>{body}</table>'
