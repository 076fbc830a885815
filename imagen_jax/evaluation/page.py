"""The parts of the report's HTML: style, images, tables.

The page has no scripts and loads nothing: images are embedded as thumbnails, so
it can be shared as one file.
"""

import base64
import html
import io
import pathlib
import typing
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imagen_jax.evaluation.generation import read_image
from imagen_jax.evaluation.scores import Categories
from imagen_jax.evaluation.suite import Record
from imagen_jax.io.decode import resize_square

THUMB = 144  # largest side of an image, in pixels

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


def page(parts: Iterable[str]) -> str:
  """The HTML document of these parts."""
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>Evaluation</title><style>{STYLE}</style><main>'
    f'{"".join(parts)}</main></html>\n'
  )


def heading(title: str, text: str) -> str:
  """The title and description of a section."""
  return f'<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>'


def cards(contents: Iterable[str], row: bool = False) -> str:
  """The contents in boxes, one below the other or in rows."""
  boxes = ''.join(f'<div class="card">{x}</div>' for x in contents)
  return f'<div class="row">{boxes}</div>' if row else boxes


def table(rows: Iterable[Sequence[typing.Any]]) -> str:
  """A table of text and numbers; the first column names the rows."""
  body = ''.join(
    f'<tr>{"".join(f"<td>{_text(value)}</td>" for value in row)}</tr>'
    for row in rows
  )
  return f'<table class="plain">{body}</table>'


def numbers(categories: Categories) -> str:
  """A table of scores that are not accuracies."""
  keys = list(dict.fromkeys(k for s in categories.values() for k in s))
  rows = [[name, *map(s.get, keys)] for name, s in categories.items()]
  return cards([table([['', *keys], *rows])])


def provenance(note: Mapping[str, typing.Any]) -> str:
  """What a suite was measured on, as a collapsed table."""
  entries = {**note['stages'], **note}
  del entries['stages']
  rows = {
    name: ', '.join(f'{k} {v}' for k, v in value.items())
    if isinstance(value, Mapping)
    else value
    for name, value in entries.items()
  }
  return (
    '<details><summary>What this was measured on</summary>'
    f'{table(rows.items())}</details>'
  )


def figure(folder: pathlib.Path, record: Record, caption: bool = True) -> str:
  """An image of a run, with its prompt and the judge's verdict."""
  image = read_image(folder, record)
  tone, mark = '', ''
  if 'correct' in record:
    tone = 'yes' if record['correct'] else 'no'
    wrong = [k for k, v in record['aspects'].items() if v is False]
    mark = '<b>✓</b> ' if record['correct'] else f'<b>✗ {", ".join(wrong)}</b> '
  prompt = html.escape(record['prompt'])
  text = f'<figcaption>{mark}{prompt}</figcaption>' if caption else ''
  return f'<figure class="{tone}">{_image(image, prompt)}{text}</figure>'


def _image(image: UInt8[np.ndarray, 'h w 3'], alt: str) -> str:
  thumb, file = Image.fromarray(image), io.BytesIO()
  kind, style = 'png', 'class="pixels"'
  if image.shape[0] >= THUMB:
    thumb = Image.fromarray(resize_square(thumb, THUMB))
    kind, style = 'jpeg', ''
  thumb.save(file, kind, quality=85)
  data = base64.b64encode(file.getvalue()).decode()
  return f'<img {style} src="data:image/{kind};base64,{data}" alt="{alt}">'


def _text(value: typing.Any) -> str:
  if value is None:
    return ''
  if isinstance(value, list):
    return ' to '.join(_text(v) for v in value)
  return f'{value:.4g}' if isinstance(value, float) else html.escape(str(value))
