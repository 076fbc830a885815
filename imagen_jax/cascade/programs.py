"""Compiled programs, kept on disk: a later process neither traces nor compiles.

Beside jax's compilation cache, which saves only the last of these steps. A
program belongs to one machine, jax, and source code; what belongs to others, or
is damaged, is compiled anew.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import serialize_executable

import imagen_jax
from imagen_jax import compiler, sharding
from imagen_jax.dtypes import NUMERICS
from imagen_jax.io import files, paths

FOLDER, MOST = 'programs', 64  # files that are kept
MAGIC = b'imagen_jax program 1\n'
LENGTH = len(MAGIC) + 64
# jax's settings, besides `NUMERICS`, and the source code, on which a program
# depends.
OPTIONS = ('jax_default_matmul_precision', 'jax_disable_most_optimizations')
CODE = (
  'cascade', 'diffusion', 'nets', 'compiler.py', 'dtypes.py', 'sharding.py',
)  # fmt: skip


class Program:
  """A jitted function that takes its compiled form from disk if it is there.

  For functions of positional trees of arrays whose result has the structure of
  the last one, called under `jax.set_mesh`. In a job of several processes it is
  the jitted function.
  """

  def __init__(
    self, function: Callable, identity: str | None, **options: Any
  ) -> None:
    """Wraps a function.

    Args:
      function: to jit.
      identity: what the function depends on besides its arguments and `CODE`;
        None: unknown, so that it is only kept in memory.
      **options: of `jax.jit`.
    """
    self._jit = functools.partial(
      jax.jit, compiler_options=compiler.sampling_options(), **options
    )
    self._jitted = self._jit(function)
    self._function, self._identity = function, identity
    self._made: dict[str, Any] = {}
    self._lock = threading.Lock()

  def prepare(self, *args: Any) -> Callable[..., Any]:
    """The compiled function of arguments of these shapes and shardings.

    Args:
      *args: arrays, or `jax.ShapeDtypeStruct`s with shardings.
    """
    if jax.process_count() > 1:
      return self._jitted
    leaves, tree = jax.tree.flatten(args)
    kind = lambda x: (x.shape, x.dtype, getattr(x, 'sharding', None))
    key = f'{tree} {[kind(leaf) for leaf in leaves]} {_mesh()}'
    with self._lock:
      if key not in self._made:
        self._made[key] = self._load_or_compile(key, args)
      return self._made[key]

  def __len__(self) -> int:
    """The number of compiled programs, one for each set of shapes."""
    return len(self._made)

  def __call__(self, *args: Any) -> Any:
    """The function's result."""
    return self.prepare(*args)(*args)

  def _load_or_compile(self, key: str, args: tuple[Any, ...]) -> Any:
    folder = _folder() if self._identity is not None else None
    if folder is None:
      return self._jitted.lower(*args).compile()
    whole = f'{_machine()}\n{_code()}\n{self._identity}\n{key}'.encode()
    file = folder / hashlib.sha256(whole).hexdigest()
    found = _read(file, whole, args)
    if found is None:
      # With a name of its own, so that jax's cache has no such program: on a
      # CPU one that has been on disk cannot be written there again.
      function = lambda *args: self._function(*args)
      function.__name__ = f'run_{secrets.token_hex(8)}'
      found = self._jit(function).lower(*args).compile()
      _write(file, whole, found)
    return found


def _folder() -> pathlib.Path | None:
  """Where programs are kept, created; None where they cannot be.

  That is a folder of this user to which nobody else can write, because a
  program is code.
  """
  setting = jax.config.values
  base = setting['jax_compilation_cache_dir'] or paths.cache_folder()
  used = setting['jax_enable_compilation_cache']
  if base is None or '://' in str(base) or not used:
    return None
  folder = pathlib.Path(base, FOLDER)
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
  except OSError:
    return None
  user = os.getuid() if hasattr(os, 'getuid') else status.st_uid  # Windows
  ours = status.st_uid == user and not status.st_mode & 0o022
  return folder if ours else None


def _mesh() -> str:
  """The mesh that is set, with its devices."""
  mesh = jax.sharding.get_mesh()
  return f'{mesh} {[d.id for d in mesh.devices.flat]}' if not mesh.empty else ''


@functools.cache
def _machine() -> str:
  """What a compiled program depends on besides the function."""
  device = jax.devices()[0]
  options = {name: str(getattr(jax.config, name)) for name in NUMERICS}
  features = ''
  if device.platform == 'cpu':
    try:
      lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
      lines = [platform.processor(), platform.machine()]
    kinds = ('vendor', 'model', 'flags', 'Features', 'CPU')
    features = '\n'.join(
      sorted({line for line in lines if line.startswith(kinds)})
    )
  return json.dumps(
    [
      *(importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')),
      device.client.platform_version,
      device.device_kind,
      len(jax.devices()),
      sharding.usable_cores(),
      options,
      [str(jax.config.values[name]) for name in OPTIONS],
      [os.environ.get(name) for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')],
      compiler.sampling_options(),
      features,
    ]
  )


@functools.cache
def _code() -> str:
  """A digest of the source code in `CODE`."""
  root = pathlib.Path(imagen_jax.__file__).parent
  digest = hashlib.sha256()
  for name in CODE:
    path = root / name
    for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
      digest.update(f'{file.relative_to(root)}\n'.encode() + file.read_bytes())
  return digest.hexdigest()


def _read(file: pathlib.Path, whole: bytes, args: Any) -> Any | None:
  """The program of a file, or None if it is missing, damaged or another's."""
  try:
    data = memoryview(file.read_bytes())
  except OSError:
    return None
  head = _head(whole, data[LENGTH:])
  if data[:LENGTH] != head:
    return None
  mesh = jax.sharding.get_mesh()
  devices = jax.devices()[:1] if mesh.empty else [*mesh.devices.flat]
  structures = jax.tree.structure((args, {})), jax.tree.structure(args[-1])
  try:
    found = serialize_executable.deserialize_and_load(
      data[LENGTH:], *structures, execution_devices=devices
    )
    os.utime(file)  # the longest unused are removed
  except Exception:  # XLA's, of many types
    return None
  return found


def _write(file: pathlib.Path, whole: bytes, program: Any) -> None:
  """Keeps a program if it can be, and removes the longest unused ones."""
  try:
    body, _, _ = serialize_executable.serialize(program)
    files.write_bytes(file, _head(whole, body) + body)
    kept = sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in kept[:-MOST]:
      path.unlink()
  except Exception:  # a full disk; XLA's, of many types
    return


def _head(whole: bytes, body: bytes | memoryview) -> bytes:
  """The first `LENGTH` bytes: a mark, what the program is, its digest."""
  return MAGIC + b''.join(hashlib.sha256(x).digest() for x in (whole, body))
