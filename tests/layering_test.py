"""The arrows of the design, and one door for each heavy library."""

import ast
import pathlib

import imagen_jax

ROOT = pathlib.Path(imagen_jax.__file__).parent

# Who may import what of ours; a folder stands for everything in it. `cli` is
# the top and may import everything.
BELOW = {
  'errors': set(),
  'typing': set(),
  'diffusion': {'typing'},
  'nets': {'sharding', 'typing'},
  'dtypes': {'errors'},
  'sharding': {'errors', 'typing'},
  'io': {'errors'},
  'text': {'errors', 'io', 'nets', 'sharding', 'typing'},
  'kinds': {'errors'},
  'data': {'errors', 'io', 'kinds'},
  'cascade': {
    'errors', 'diffusion', 'dtypes', 'io', 'kinds', 'nets', 'sharding', 'text',
    'typing',
  },
  'training': {
    'errors', 'cascade', 'data', 'dtypes', 'io', 'kinds', 'sharding', 'text',
    'typing',
  },
  'evaluation': {'errors', 'cascade', 'data', 'io', 'kinds', 'text'},
  'worlds': {
    'data', 'errors', 'evaluation', 'io', 'nets', 'text', 'training',
  },
  'deepfloyd': {
    'errors', 'cascade', 'cli', 'diffusion', 'dtypes', 'io', 'nets', 'typing',
    'sharding', 'text', 'training',
  },
  'planning': {
    'errors', 'cascade', 'io', 'nets', 'sharding', 'text', 'training'
  },
}  # fmt: skip
DOORS = {
  'orbax': {'io/checkpoint.py'},
  'safetensors': {'io/safetensors.py'},
  'transformers': {'text/'},
  'sentencepiece': {'text/', 'worlds/vocabulary.py', 'worlds/pretraining.py'},
  'tensorflow_datasets': {'data/tfds.py'},
  'array_record': {'data/arrayrecord.py'},
  'grain': {'data/'},
  'optax': {'training/', 'worlds/pretraining.py'},
}


def modules(path):
  """Every module that a file imports, wherever in the file."""
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
