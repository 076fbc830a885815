r"""Cleans prompts like the captions that IF was trained on.

IF's authors removed links, markup, handles, file names, shop phrases and
article numbers from web captions, and prompts should have the same
distribution. The steps and their order reproduce that training: they are
applied twice, and one meant to trim has no effect. A prompt written by hand is
rarely changed beyond its capitals.

Two steps need `beautifulsoup4` and `ftfy`: pip install imagen_jax[deepfloyd].
Without them a prompt is only lower-cased and trimmed, as in diffusers.
"""

import html
import importlib.util
import re
import sys
import urllib.parse
from collections.abc import Callable, Iterable

DOMAIN = r'[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)'
FILES = 'png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4'
DASHES = (
  '\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40'
  '\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d'
)
# Applied before the markup is removed: (pattern, replacement).
FIRST = [
  ('<person>', 'person'),
  (rf'\b((?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN}))', ''),
  (rf'\b((?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN}))', ''),
]
SECOND = [
  (r'@[\w\d]+\b', ''),  # handles
  # CJK strokes, phonetic extensions, enclosed, compatibility, ideographs.
  ('[\u31c0-\u9fff]+', ''),
  (f'[{DASHES}]+', '-'),
  ('[`´«»“”¨]', '"'),
  ('[‘’]', "'"),
  ('&quot;?', ''),
  ('&amp', ''),
  (r'\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}', ' '),  # addresses
  (r'\d:\d\d\s+$', ''),
  (r'\\n', ' '),
  (r'#\d{1,3}\b', ''),
  (r'#\d{5,}\b', ''),
  (r'\b\d{6,}\b', ''),
  (rf'[\S]+\.(?:{FILES})', ''),
  (r'[\"\']{2,}', '"'),
  (r'[\.]{2,}', ' '),
  ('[#®•©™&@·º½¾¿¡§~)(\\]\\[}{|\\\\/*]{1,}', ' '),
  (r'\s+\.\s+', ' '),
]
JOINED = re.compile('[-_]')
THIRD = [
  (r'\b[a-zA-Z]{1,3}\d{3,15}\b', ''),  # article numbers
  (r'\b[a-zA-Z]+\d+[a-zA-Z]+\b', ''),
  (r'\b\d+[a-zA-Z]+\d+\b', ''),
  (r'(worldwide\s+)?(free\s+)?shipping', ''),
  (r'(free\s)?download(\sfree)?', ''),
  (r'\bclick\b\s(?:for|on)\s\w+', ''),
  (rf'\b(?:{FILES})(\simage[s]?)?', ''),
  (r'\bpage\s+\d+\b', ''),
  (r'\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b', ' '),
  (r'\b\d+\.?\d*[xх×]\d+\.?\d*\b', ''),  # the second x is Cyrillic
  (r'\b\s+\:\s+', ': '),
  (r'(\D[,\./])\b', r'\1 '),
  (r'\s+', ' '),
  (r'^[\"\']([\w\W]+)[\"\']$', r'\1'),
  (r'^[\'\_,\-\:;]', ''),
  (r'[\'\_,\-\:\-\+]$', ''),
  (r'^\.\S+$', ''),
]


def cleaner(thorough: bool) -> Callable[[str], str]:
  """Returns a function that cleans one prompt.

  Args:
    thorough: clean as IF's training captions were; False only lower-cases and
      trims. If its packages are missing, so does True, with a note on stderr.
  """
  if thorough:
    missing = [
      name
      for module, name in (('bs4', 'beautifulsoup4'), ('ftfy', 'ftfy'))
      if importlib.util.find_spec(module) is None
    ]
    if not missing:
      return lambda prompt: clean(clean(prompt))
    print(
      f'note: prompts are only lower-cased, because {" and ".join(missing)} '
      'is missing; run pip install imagen_jax[deepfloyd].',
      file=sys.stderr,
    )
  return lambda prompt: prompt.lower().strip()


def clean(prompt: str) -> str:
  """One pass of IF's cleaning; IF does two."""
  import bs4
  import ftfy

  text = urllib.parse.unquote_plus(prompt).strip().lower()
  text = _replace(FIRST, text)
  text = bs4.BeautifulSoup(text, features='html.parser').text
  text = _replace(SECOND, text)
  if len(JOINED.findall(text)) > 3:  # this-is-my-cute-cat
    text = JOINED.sub(' ', text)
  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return _replace(THIRD, text).strip()


def _replace(rules: Iterable[tuple[str, str]], text: str) -> str:
  for pattern, replacement in rules:
    text = re.sub(pattern, replacement, text)
  return text
