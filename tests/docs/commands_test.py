"""Every command in README.md and docs/ has flags and config keys that exist."""

import contextlib
import importlib
import io
import pathlib
import re
import shlex

import pytest

from imagen_jax.cli.configs import load_config, split_overrides

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
MAIN = {
  **{f'{name}.py': name for name in ('train', 'sample', 'evaluate', 'plan')},
  **{
    f'imagen-{n}': n for n in ('prepare', 'embed', 'index', 'export', 'watch')
  },
  'imagen-web': 'web',
}
BLOCK = re.compile(r'^```([^\n]*)\n(.*?)^```$', re.M | re.S)
COMMAND = re.compile(rf'(?:^|[ ;])({"|".join(map(re.escape, MAIN))}) (--.*)')


def commands(page):
  """(name, arguments) of each command of a page."""
  text = page.read_text(encoding='utf-8')
  for language, block in BLOCK.findall(text):
    if language:
      continue
    for line in block.replace('\\\n', ' ').splitlines():
      for found in COMMAND.finditer(line):
        argv = shlex.split(found[2], comments=True)
        yield MAIN[found[1]], [*argv[: _end(argv)]]


def _end(argv):
  ends = [argv.index(mark) for mark in ('&', '&&', '>', '--') if mark in argv]
  return min(ends, default=len(argv))


def known_flags(name):
  out = io.StringIO()
  module = 'web.command' if name == 'web' else f'cli.{name}'
  with contextlib.redirect_stdout(out):
    importlib.import_module(f'imagen_jax.{module}').main(['--help'])
  return set(re.findall(r'--\w+', out.getvalue()))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_flags_and_config_keys_of_the_commands_exist(page):
  for name, argv in commands(page):
    plain, overrides = split_overrides(argv)
    flags = {word for word in plain if word.startswith('--')}
    unknown = flags - known_flags(name)
    assert not unknown, (name, unknown)
    if overrides:
      config = plain[plain.index('--config') + 1].partition(':')[0]
      load_config(config, [o.replace('SEED', '0') for o in overrides])


def test_the_readme_has_commands_of_every_kind_but_that_for_large_data():
  found = {name for name, _ in commands(ROOT / 'README.md')}
  assert found == {*MAIN.values()} - {'index'}
