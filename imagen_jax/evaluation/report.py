"""One page that shows an evaluation: `index.html`, alone and without script.

Everything is made anew from `scores.json` and the runs' folders beside it;
images are put into the page as small copies, so the file can be sent.
"""

import base64
import html
import io
import itertools
import pathlib

from PIL import Image

from imagen_jax.errors import DataError
from imagen_jax.evaluation import charts, generation, scores
from imagen_jax.worlds import suite as shapes_suite

SHOWN = 24  # images of a category on the page
THUMB = 144  # their side, in pixels

STYLE = """
:root{--ink:#1c2430;--soft:#66707d;--line:#e3e6ea;--back:#fafbfc;--card:#fff;
--bar:#2563eb;--control:#c4c9d0}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#98a2b0;
--line:#2c333d;--back:#14181e;--card:#1b2028;--bar:#5b8def;--control:#4a525d}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:21px;margin:46px 0 4px}h3{font-size:15px;margin:26px 0 8px}
p{margin:4px 0 12px;color:var(--soft);max-width:70ch}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;
padding:20px;margin:14px 0;overflow-x:auto}
.row{display:flex;flex-wrap:wrap;gap:0 18px}.row .card{padding:14px;
margin:8px 0}
svg{display:block;max-width:100%;height:auto;font-size:13px}
svg text{fill:var(--ink)}svg .tick{fill:var(--soft);font-size:12px}
svg .value{font-weight:600}svg .rule{stroke:var(--line)}
svg .bar{fill:var(--bar)}svg .control{fill:var(--control)}
svg .whisker{stroke:var(--ink);fill:none;opacity:.65}
svg .mark{stroke:#059669;stroke-width:2.5}
.grid{display:grid;gap:12px;
grid-template-columns:repeat(auto-fill,minmax(118px,1fr))}
figure{margin:0;font-size:12px;line-height:1.35}
figure img{width:100%;aspect-ratio:1;border-radius:8px;display:block;
border:1px solid var(--line)}
figure.no img{outline:3px solid #dc2626;outline-offset:-1px}
figcaption{margin-top:4px;overflow-wrap:anywhere}
figcaption b{color:#dc2626}figure.yes figcaption b{color:#059669}
table{border-collapse:collapse;font-size:13px}
td,th{padding:4px 10px;text-align:left;font-weight:400}
.plain td,.plain th{border-bottom:1px solid var(--line)}
.plain th,.plain td:first-child{color:var(--soft)}
.matrix td{width:34px;height:28px;padding:0;text-align:center;
border:1px solid var(--line)}
.matrix th{padding:2px 6px;color:var(--soft);font-size:12px}
.matrix th span{writing-mode:vertical-rl;transform:rotate(180deg)}
.matrix caption{text-align:left;font-weight:600;padding-bottom:6px}
.key{margin-right:18px;font-size:13px}
.key i{display:inline-block;width:12px;height:12px;border-radius:3px;
margin-right:6px;vertical-align:-1px}
.pixels{image-rendering:pixelated}
details summary{cursor:pointer;color:var(--soft)}
"""


def write(out):
  """Writes `index.html` of a report folder; returns its path.

  Raises:
    DataError: the folder has no scores, or an image of a run is gone.
  """
  out = pathlib.Path(out)
  found = scores.read_scores(out)
  notes = found.pop('provenance', {})
  if not found:
    raise DataError(f'{out} holds no scores yet; run evaluate.py first.')
  plain = [s for s in notes if '@' not in s and not s.startswith('judge')]
  parts = [_head(notes)]
  for suite in plain:
    own = found.get(suite.replace('shapes', 'judge', 1), {})
    parts += _suite(out, suite, found[suite], own, notes[suite])
  swept = [s for s in notes if '@' in s and not s.startswith('judge')]
  for label, group in itertools.groupby(
    sorted(swept, key=lambda s: (s.partition('@')[0], _keys(s))),
    key=lambda s: (s.partition('@')[0], _keys(s)),
  ):
    group = set(group)
    ordered = [s for s in notes if s in group]
    parts += _sweep(out, label[0], ordered, found, notes)
  page = (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>Evaluation</title><style>{STYLE}</style><main>'
    f'{"".join(parts)}</main></html>\n'
  )
  path = out / 'index.html'
  path.write_text(page, encoding='utf-8')
  return path


def _head(notes):
  models = dict.fromkeys(
    f'{n["model"]} ({n["model_digest"]})' for n in notes.values()
  )
  dates = sorted({n['date'] for n in notes.values()})
  return (
    f'<h1>Evaluation</h1><p>{html.escape(", ".join(models))} · '
    f'{" to ".join(dict.fromkeys((dates[0], dates[-1])))}</p>'
  )


TITLES = {
  'shapes': (
    'Does the image show what the sentence says?',
    'The fraction of images that a classical judge finds wholly right, with '
    "Wilson's 95 % intervals. The green tick is the judge's own accuracy on "
    'true images of the same scenes; “shuffled” is the control, the same '
    'images judged by another sentence.',
  ),
  'shapes_from_truth': (
    'Super-resolution on true small images',
    'The super-resolution stages were given true images at the base '
    'resolution, so what is wrong here is their own doing.',
  ),
  'prompts': ('Images of prompts', 'By category, the first of each.'),
  'clip': (
    'CLIP score',
    '100 times the cosine of image and sentence, with 95 % intervals.',
  ),
  'fid': (
    'Distance from real images',
    'Smaller Fréchet, KID and CMMD are better; precision, recall and CLIP '
    'score larger.',
  ),
}


def _title(suite):
  title, text = TITLES.get(suite, (suite, ''))
  return f'<h2>{html.escape(title)}</h2><p>{text}</p>'


def _suite(out, suite, categories, own, note):
  """The section of one run."""
  folder = out / note['run']
  records = generation.read_records(folder)
  yield _title(suite)
  if all('accuracy' in score for score in categories.values()):
    rows = [
      (
        name,
        score,
        own.get(name, {}).get('accuracy'),
        name == shapes_suite.CONTROL,
      )
      for name, score in categories.items()
      if name != 'judge'
    ]
    yield f'<div class="card">{charts.bars(rows)}</div>'
    tables = shapes_suite.confusions(records)
    cards = [
      f'<div class="card">{charts.matrix(table, f"{name}: said, seen")}</div>'
      for name, table in tables.items()
      if table
    ]
    yield f'<h3>Confusions</h3><div class="row">{"".join(cards)}</div>'
  else:
    yield _numbers(categories)
  yield _settings(note)
  by_category = {}
  for _, record in sorted(records.items(), key=lambda item: item[0][1]):
    by_category.setdefault(record['category'], []).append(record)
  known = list(categories)
  for category, group in sorted(
    by_category.items(),
    key=lambda item: known.index(item[0]) if item[0] in known else 0,
  ):
    figures = ''.join(_figure(folder, r) for r in group[:SHOWN])
    some = f'{min(SHOWN, len(group))} of {len(group)}'
    yield (
      f'<h3>{html.escape(category)} <span class="key">({some})</span></h3>'
      f'<div class="grid">{figures}</div>'
    )


def _figure(folder, record, caption=True):
  image = generation.read_image(folder, record)
  tone, mark = '', ''
  if 'correct' in record:
    tone = 'yes' if record['correct'] else 'no'
    wrong = [k for k, v in record['aspects'].items() if v is False]
    mark = '<b>✓</b> ' if record['correct'] else f'<b>✗ {", ".join(wrong)}</b> '
  told = html.escape(record['prompt'], quote=True)
  text = f'<figcaption>{mark}{told}</figcaption>' if caption else ''
  return f'<figure class="{tone}">{_image(image, told)}{text}</figure>'


def _image(image, alt):
  side = image.shape[0]
  image = Image.fromarray(image)
  kind = ' class="pixels"' if side < THUMB else ''
  if side > THUMB:
    image = image.resize((THUMB, THUMB), Image.Resampling.BOX)
  file = io.BytesIO()
  if side < THUMB:
    image.save(file, 'PNG')
  else:
    image.save(file, 'JPEG', quality=85)
  data = base64.b64encode(file.getvalue()).decode()
  type_ = 'png' if side < THUMB else 'jpeg'
  return f'<img{kind} src="data:image/{type_};base64,{data}" alt="{alt}">'


def _numbers(categories):
  """A table of a suite whose scores are not fractions."""
  keys = list(dict.fromkeys(k for s in categories.values() for k in s))
  head = ''.join(f'<th>{html.escape(k)}</th>' for k in keys)
  rows = ''.join(
    f'<tr><td>{html.escape(name)}</td>'
    + ''.join(f'<td>{_told(score.get(k))}</td>' for k in keys)
    + '</tr>'
    for name, score in categories.items()
  )
  table = f'<table class="plain"><tr><th></th>{head}</tr>{rows}</table>'
  return f'<div class="card">{table}</div>'


def _told(value):
  if value is None:
    return ''
  if isinstance(value, list):
    return ' to '.join(_told(v) for v in value)
  return f'{value:.4g}' if isinstance(value, float) else html.escape(str(value))


def _settings(note):
  stages = ''.join(
    f'<tr><td>{html.escape(name)}</td><td>'
    + html.escape(', '.join(f'{k} {v}' for k, v in values.items()))
    + '</td></tr>'
    for name, values in note['stages'].items()
  )
  rest = ''.join(
    f'<tr><td>{html.escape(k)}</td><td>{_told(v)}</td></tr>'
    for k, v in note.items()
    if k != 'stages'
  )
  return (
    '<details><summary>What this was measured on</summary>'
    f'<table class="plain">{stages}{rest}</table></details>'
  )


def _pairs(suite):
  """'shapes@a=1,b=2' as [('a', '1'), ('b', '2')]."""
  text = suite.partition('@')[2]
  return [tuple(part.split('=')) for part in text.split(',')]


def _keys(suite):
  return tuple(key for key, _ in _pairs(suite))


def _sweep(out, label, suites, found, notes):
  """The section of all runs of a sweep: curves, then a grid of images."""
  across = _pairs(suites[0])[-1][0]
  by_line = {}
  for suite in suites:
    *others, (_, x) = _pairs(suite)
    name = ', '.join(f'{k} {v}' for k, v in others) or label
    by_line.setdefault(name, []).append((_value(x), found[suite]))
  title = f'{TITLES.get(label, (label, ""))[0]} By {across}'
  yield f'<h2>{html.escape(title)}</h2>'
  if len(by_line) > 1:
    yield f'<p>{charts.legend(by_line)}</p>'
  generated = []
  categories = dict.fromkeys(c for s in suites for c in found[s])
  for category in categories:
    if category == 'judge':
      continue
    for key, percent in _metrics(found[suites[0]].get(category, {})):
      lines = [
        (
          name,
          [(x, s[category][key], _ends(s[category], key)) for x, s in line],
        )
        for name, line in by_line.items()
      ]
      told = category if key in ('accuracy', 'mean') else key
      generated.append(
        charts.curves(lines, title=told, across=across, up=key, percent=percent)
      )
    if {'frechet', 'clip_score'} <= found[suites[0]].get(category, {}).keys():
      lines = [
        (
          name,
          [
            (s[category]['clip_score'], s[category]['frechet'], None)
            for _, s in line
          ],
        )
        for name, line in by_line.items()
      ]
      generated.insert(
        0,
        charts.curves(
          lines,
          title='Fréchet distance against CLIP score',
          across='CLIP score',
          up='Fréchet distance',
        ),
      )
  cards = ''.join(f'<div class="card">{chart}</div>' for chart in generated)
  yield f'<div class="row">{cards}</div>'
  yield _sweep_grid(out, suites, notes)
  yield _settings(notes[suites[0]])


def _value(text):
  try:
    return float(text)
  except ValueError:
    return text


def _metrics(score):
  """[(key, is a fraction in [0, 1])] of what can be generated as a curve."""
  skipped = ('n', 'n_real', 'ci95', 'kid_sd')
  fractions = ('accuracy', 'precision', 'recall')
  return [(k, k in fractions) for k in score if k not in skipped]


def _ends(score, key):
  if key in ('accuracy', 'mean') and 'ci95' in score:
    low, high = score['ci95']
    # Of a mean the axis encloses the points alone.
    return (low, high) if key == 'accuracy' else None
  return None


def _sweep_grid(out, suites, notes, rows=4):
  """The same prompts down, the runs across."""
  runs = [(s, out / notes[s]['run']) for s in suites[:8]]
  records = {s: generation.read_records(folder) for s, folder in runs}
  every = sorted(records[suites[0]])
  chosen = [k for k in every if k[1] == 0][:rows] or every[:rows]
  head = ''.join(
    f'<th>{html.escape(s.partition("@")[2])}</th>' for s, _ in runs
  )
  body = ''
  for key in chosen:
    cells = ''.join(
      f'<td style="width:130px">{_figure(folder, records[s][key], False)}</td>'
      for s, folder in runs
      if key in records[s]
    )
    prompt = html.escape(records[suites[0]][key]['prompt'])
    body += f'<tr><td style="width:140px">{prompt}</td>{cells}</tr>'
  table = f'<table><tr><th></th>{head}</tr>{body}</table>'
  return f'<div class="card">{table}</div>'
