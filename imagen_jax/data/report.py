"""The report on a prepared set as one page, with what was left out.

The page has no scripts and loads nothing, so it can be shared as one file.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from imagen_jax.io.decode import BadSample, opened, upright

JSON, HTML = 'report.json', 'report.html'
SIDE = 96  # of a thumbnail, in pixels
# (name of the image, why it was left out, JPEG in base 64)
Thumbnail: TypeAlias = Sequence[str]

STYLE = """
body{margin:40px auto;max-width:960px;padding:0 24px;color:#1c2430;
font:15px/1.5 system-ui,sans-serif}
table{border-collapse:collapse}td{padding:4px 18px 4px 0;vertical-align:top;
border-bottom:1px solid #e3e6ea;overflow-wrap:anywhere}
td:first-child{color:#66707d}
figure{display:inline-block;width:120px;margin:8px;vertical-align:top;
font-size:12px;overflow-wrap:anywhere}
@media (prefers-color-scheme:dark){body{background:#14181e;color:#e6e9ee}
td{border-color:#2c333d}}
"""


def thumbnail(data: bytes | None) -> str | None:
  """A small JPEG of an encoded image, in base 64; None if it is damaged."""
  if not data:
    return None
  try:
    with opened(data, min_side=1) as image:
      small = upright(image)
  except BadSample:
    return None
  small.thumbnail((SIDE, SIDE))
  file = io.BytesIO()
  small.save(file, 'jpeg', quality=75)
  return base64.b64encode(file.getvalue()).decode()


def page(found: Mapping[str, Any], thumbnails: Iterable[Thumbnail]) -> str:
  """The HTML document.

  Args:
    found: report.json.
    thumbnails: of images that were left out.
  """
  timing, again = found['timing'], found['duplicates']
  facts = {
    'images kept': f'{found["kept"]:,}',
    'stored as': f'{found["encode"]}, {found["size"]} pixels',
    'bytes': f'{found["bytes"] / 1e9:,.3f} GB in {found["shards"]} parts',
    'exact duplicates': f'{again["found"]:,}, {again["removed"]:,} removed',
    **{f'setting {k}': v for k, v in found['settings'].items()},
  }
  if timing:
    rate = timing['images_per_process_second']
    facts['images/s'] = f'{rate:,} by each process'
  dropped = sorted(
    found['dropped'].items(), key=lambda item: -item[1]['number']
  )
  parts = [
    '<h1>Prepared data</h1>',
    _table(facts.items()),
    '<h2>Lost shards</h2>' if found['lost'] else '',
    _table((lost['shard'], lost['reason']) for lost in found['lost']),
    '<h2>Left out</h2>' if dropped else '<p>Nothing was left out.</p>',
    _table((f'{d["number"]:,}', r, *d['examples']) for r, d in dropped),
    *map(_figure, thumbnails),
    '<h2>Captions</h2>',
    _table((k, f'{n:,}') for k, n in found['captions'].items()),
  ]
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>Prepared data</title><style>{STYLE}</style>{"".join(parts)}'
    '</html>\n'
  )


def _table(rows: Iterable[Sequence[Any]]) -> str:
  body = ''.join(
    f'<tr>{"".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)}</tr>'
    for row in rows
  )
  return f'<table>{body}</table>' if body else ''


def _figure(thumbnail: Thumbnail) -> str:
  name, reason, data = thumbnail
  return (
    f'<figure><img src="data:image/jpeg;base64,{data}" alt="">'
    f'<figcaption>{html.escape(name)}: {html.escape(reason)}</figcaption>'
    '</figure>'
  )
