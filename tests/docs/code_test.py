"""Python in README.md, docs/ and notebooks/ uses names that the package has."""

import ast
import importlib.util
import inspect
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
BLOCK = re.compile(r'^```python[^\n]*\n(.*?)^```$', re.M | re.S)
SHELL = re.compile(r'^\s*[!%](?:.*\\\n)*.*$', re.M)
UNKNOWN = object()


def code_of_notebook(path):
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
  return '\n'.join(code)


def code_of_page(path):
  return '\n'.join(BLOCK.findall(path.read_text(encoding='utf-8')))


def faults(code):
  """Names and keywords of imagen_jax in `code` that do not exist."""
  tree, known, found = ast.parse(SHELL.sub('', code)), {}, []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for name in node.names:
        if name.name.partition('.')[0] == 'imagen_jax':
          importlib.import_module(name.name)
          known['imagen_jax'] = importlib.import_module('imagen_jax')
    elif isinstance(node, ast.ImportFrom):
      if (node.module or '').partition('.')[0] == 'imagen_jax':
        for name in node.names:
          value = _member(node.module, name.name)
          if value is None:
            found.append(f'{node.module}.{name.name}')
          known[name.asname or name.name] = value

  def resolve(node):
    if isinstance(node, ast.Name):
      return known.get(node.id)
    if isinstance(node, ast.Attribute):
      owner = resolve(node.value)
      if inspect.ismodule(owner):
        value = _member(owner.__name__, node.attr)
        if value is None:
          found.append(f'{owner.__name__}.{node.attr}')
        return value
    return None

  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      resolve(node)
    elif isinstance(node, ast.Call):
      given = {k.arg for k in node.keywords if k.arg}
      missing = given - keywords(resolve(node.func), given)
      found += [f'{ast.unparse(node.func)}({key}=)' for key in missing]
  return sorted({*found})


def keywords(function, given):
  """The keywords of `function`; `given` where it takes any."""
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError):  # no function, or one without a signature
    return given
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return given
  return {*parameters}


def _member(module, name):
  owner = importlib.import_module(module)
  if hasattr(owner, name):
    return getattr(owner, name)
  inner = f'{module}.{name}'
  if not hasattr(owner, '__path__') or importlib.util.find_spec(inner) is None:
    return None
  try:
    return importlib.import_module(inner)
  except ModuleNotFoundError:  # of an extra that is not installed
    return UNKNOWN


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_names_in_notebooks_exist(path):
  assert not faults(code_of_notebook(path))


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_names_in_pages_exist(path):
  assert not faults(code_of_page(path))


def test_a_name_or_a_keyword_that_does_not_exist_is_found():
  code = (
    'import imagen_jax\n'
    'from imagen_jax.io import model_folder, nothing\n'
    'from imagen_jax.diffusion.samplers import SamplerSpec as Spec\n'
    'model_folder.demo()\n'
    'imagen_jax.load("demo", colour=1)\n'
    'Spec(steps=3, stairs=4)\n'
  )
  assert faults(code) == [
    'Spec(stairs=)',
    'imagen_jax.io.model_folder.demo',
    'imagen_jax.io.nothing',
    'imagen_jax.load(colour=)',
  ]
