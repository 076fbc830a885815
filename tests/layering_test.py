"""Allowed imports between packages, of heavy libraries, and forbidden words."""

import ast
import pathlib
import re

import imagen_jax

ROOT = pathlib.Path(imagen_jax.__file__).parent

# The packages that each package may import. `cli` is the top layer and may
# import everything.
BELOW = {
  'compiler': set(),
  'errors': set(),
  'typing': set(),
  'diffusion': {'typing'},
  'collectives': {'sharding', 'typing'},
  'nets': {'collectives', 'sharding', 'typing'},
  'dtypes': {'errors'},
  'sharding': {'errors', 'typing'},
  'io': {'errors', 'sharding'},
  'text': {'collectives', 'errors', 'io', 'nets', 'sharding', 'typing'},
  'kinds': {'errors'},
  'data': {'errors', 'io', 'kinds'},
  'cascade': {
    'compiler', 'errors', 'diffusion', 'dtypes', 'io', 'kinds', 'nets',
    'sharding', 'text', 'typing',
  },
  'training': {
    'collectives', 'compiler', 'errors', 'cascade', 'data', 'diffusion',
    'dtypes', 'io', 'kinds', 'sharding', 'text', 'typing',
  },
  'evaluation': {'errors', 'cascade', 'data', 'io', 'kinds', 'nets', 'text'},
  'worlds': {
    'data', 'errors', 'evaluation', 'io', 'nets', 'text', 'training', 'typing',
  },
  'deepfloyd': {
    'compiler', 'errors', 'cascade', 'cli', 'diffusion', 'dtypes', 'io', 'nets',
    'sharding', 'text', 'training', 'typing',
  },
  'planning': {
    'errors', 'cascade', 'io', 'nets', 'sharding', 'text', 'training'
  },
  'web': {'errors', 'cascade', 'cli', 'diffusion', 'io'},
}  # fmt: skip
DOORS = {
  'apache_beam': {'cli/beam.py'},
  'orbax': {'io/checkpoint.py'},
  'safetensors': {'io/safetensors.py'},
  'transformers': {'text/'},
  'tokenizers': {'text/'},
  'sentencepiece': {'text/', 'worlds/vocabulary.py', 'worlds/pretraining.py'},
  'tensorflow_datasets': {'data/tfds.py'},
  'array_record': {'data/arrayrecord.py', 'data/records.py'},
  'grain': {'data/'},
  'pyarrow': {'data/metadata.py'},
  'gradio': {'web/'},
  'optax': {'training/', 'worlds/network.py'},
}


def modules(path):
  """Every module that a file imports, inside functions too."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


FILES = [path for path in ROOT.rglob('*.py') if path.name != '__init__.py']


def test_imports_point_one_way():
  wrong, used = [], {part: set() for part in BELOW}
  for path in FILES:
    part = path.relative_to(ROOT).parts[0].removesuffix('.py')
    if part == 'cli':
      continue
    for module in modules(path):
      names = module.split('.')
      if names[0] == 'imagen_jax' and len(names) > 1 and names[1] != part:
        used[part].add(names[1])
        if names[1] not in BELOW[part]:
          wrong.append(f'{path.relative_to(ROOT)} imports {module}')
  assert not wrong
  unused = {part: BELOW[part] - used[part] for part in BELOW}
  assert not {part: names for part, names in unused.items() if names}


def test_heavy_libraries_have_one_door():
  wrong = []
  for path in FILES:
    here = path.relative_to(ROOT).as_posix()
    for module in modules(path):
      doors = DOORS.get(module.split('.')[0])
      if doors and not any(here.startswith(door) for door in doors):
        wrong.append(f'{here} imports {module}')
    if 'NamedSharding' in path.read_text() and here != 'sharding.py':
      wrong.append(f'{here} says NamedSharding')
  assert not wrong


def test_diffusion_needs_jax_alone():
  allowed = {
    'jax', 'jaxtyping', 'math', 'functools', 'dataclasses', 'typing',
    'collections', 'imagen_jax',
  }  # fmt: skip
  for path in (ROOT / 'diffusion').glob('*.py'):
    assert {m.split('.')[0] for m in modules(path)} <= allowed


# Names of the leaves; the core may use them in the two tables only.
LEAVES = re.compile(
  r"deepfloyd|emoji|\bworlds\b|\bplanning\b|'shapes'|shapes_(base|sr1|sr2|text)"
  r'|shapes (world|suite|demo)',
  re.IGNORECASE,
)
TABLES = {'data/sources.py', 'training/experiment.py'}
ROW = re.compile(r"^  '\w+': 'imagen_jax\.\w+\.\w+:\w+',$")


def test_the_core_knows_no_leaf():
  found = []
  for path in FILES:
    here = path.relative_to(ROOT)
    if here.parts[0] in ('worlds', 'deepfloyd', 'planning', 'web', 'cli'):
      continue
    for line in path.read_text(encoding='utf-8').splitlines():
      row = here.as_posix() in TABLES and ROW.match(line)
      if LEAVES.search(line) and not row:
        found.append(f'{here}: {line.strip()}')
  assert not found


# Words that CONTRIBUTING.md replaces by the field's terms.
OLD = re.compile(
  r'\b(pictures?|drawn|draws|goes on|way down|way up|insist|enlarges?|'
  r'lab notes)\b',
  re.IGNORECASE,
)
# Files that need some of these words, such as "a picture of" in captions.
SAID = {
  'captions.py',
  'understanding.py',
  'layering_test.py',
  'CONTRIBUTING.md',
  'CHANGELOG.md',
}


def test_the_words_are_the_fields():
  top, found = ROOT.parent, []
  folders = ('imagen_jax', 'configs', 'docs', 'tests', 'benchmarks', 'scripts')
  files = [p for name in folders for p in (top / name).rglob('*')]
  for path in [*files, *top.glob('*.py'), *top.glob('*.md')]:
    if path.suffix not in ('.py', '.md') or path.name in SAID:
      continue
    for line in path.read_text(encoding='utf-8').splitlines():
      if OLD.search(line):
        found.append(f'{path.relative_to(top)}: {line.strip()[:80]}')
  assert not found
