"""The report of an evaluation, one page: `index.html`.

It is rebuilt each time from `scores.json` and the run folders beside it, for
all suites there.
"""

import dataclasses
import html
import itertools
import pathlib
import typing
from collections.abc import Iterator

from imagen_jax.errors import DataError
from imagen_jax.evaluation import charts, page, scores
from imagen_jax.evaluation.generation import read_records
from imagen_jax.evaluation.suite import Record, Records, Suite
from imagen_jax.evaluation.sweep_report import keys, sweep_section
from imagen_jax.io import files

SHOWN = 24  # images per category on the page
SECTION = 'section.json'


@dataclasses.dataclass(frozen=True)
class Section:
  """The report's text on a run, besides the scores; see `Suite`."""

  title: str
  description: str
  controls: list[str]
  reference: str | None
  confusions: dict[str, dict[str, dict[str, int]]]


def save_section(suite: Suite, folder: pathlib.Path, records: Records) -> None:
  """Writes a finished run's `section.json`."""
  section = Section(
    *suite.heading(),
    controls=list(suite.controls),
    reference=suite.reference,
    confusions=suite.confusions(records),
  )
  files.write_json(folder / SECTION, {'format_version': 1} | vars(section))


def _read_section(folder: pathlib.Path) -> Section:
  value = files.read_json(folder / SECTION, error=DataError, version=1)
  del value['format_version']
  try:
    return Section(**value)
  except TypeError as error:
    raise DataError(
      f'{folder / SECTION} is not what this version writes ({error}); delete '
      f'{folder} and run again.'
    ) from error


def write(out: pathlib.Path) -> pathlib.Path:
  """Writes `index.html` of a report folder; returns its path.

  Raises:
    DataError: the folder has no scores, or an image of a run is missing.
  """
  found = scores.read_scores(out)
  notes = found.pop('provenance', {})
  if not found:
    raise DataError(f'{out} holds no scores yet; run the evaluation first.')
  sections = {
    label: _read_section(out / note['run']) for label, note in notes.items()
  }
  # Further entries, such as a judge's, belong to the section of their suite.
  shown = [x for x in notes if x.partition('@')[0] == notes[x]['suite']]
  parts = [_head(notes)]
  for label in (x for x in shown if '@' not in x):
    parts += _section(out, label, sections[label], found, notes[label])
  group_key = lambda x: (x.partition('@')[0], keys(x))
  swept = sorted((x for x in shown if '@' in x), key=group_key)
  for _, group in itertools.groupby(swept, key=group_key):
    labels = list(group)
    title = sections[labels[0]].title
    parts += sweep_section(out, title, labels, found, notes)
  path = out / 'index.html'
  path.write_text(page.page(parts), encoding='utf-8')
  return path


def _head(notes: dict[str, typing.Any]) -> str:
  models = dict.fromkeys(
    f'{n["model"]} ({n["model_digest"]})' for n in notes.values()
  )
  dates = sorted({n['date'] for n in notes.values()})
  return (
    f'<h1>Evaluation</h1><p>{html.escape(", ".join(models))} · '
    f'{" to ".join(dict.fromkeys((dates[0], dates[-1])))}</p>'
  )


def _section(
  out: pathlib.Path,
  label: str,
  section: Section,
  found: dict[str, typing.Any],
  note: dict[str, typing.Any],
) -> Iterator[str]:
  """The section of one run: scores, confusions, images by category."""
  categories = found[label]
  yield page.heading(section.title, section.description)
  accuracies = {k: v for k, v in categories.items() if 'accuracy' in v}
  if accuracies:
    reference = found.get(section.reference or '', {})
    rows = [
      charts.Bar(
        name,
        score,
        mark=reference.get(name, {}).get('accuracy'),
        control=name in section.controls,
      )
      for name, score in accuracies.items()
    ]
    yield page.cards([charts.bars(rows)])
  if len(accuracies) < len(categories):
    yield page.numbers(
      {k: v for k, v in categories.items() if k not in accuracies}
    )
  tables = [
    charts.matrix(counts, f'{name}: prompted, seen')
    for name, counts in section.confusions.items()
    if counts
  ]
  if tables:
    yield '<h3>Confusions</h3>' + page.cards(tables, row=True)
  yield page.provenance(note)
  yield from _images(out / note['run'], list(categories))


def _images(folder: pathlib.Path, categories: list[str]) -> Iterator[str]:
  """The first images of each category, in the order of the scores."""
  groups: dict[str, list[Record]] = {name: [] for name in categories}
  for _, record in sorted(read_records(folder).items()):
    groups.setdefault(record['category'], []).append(record)
  for category, group in groups.items():
    if group:
      figures = ''.join(page.figure(folder, r) for r in group[:SHOWN])
      some = f'{min(SHOWN, len(group))} of {len(group)}'
      yield (
        f'<h3>{html.escape(category)} <span class="key">({some})</span></h3>'
        f'<div class="grid">{figures}</div>'
      )
