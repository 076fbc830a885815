"""Compiled programs, kept on disk: a later process neither traces nor compiles.

Beside jax's compilation cache, which saves only the last of these steps. A
program belongs to one machine, jax, and source code; what belongs to others, or
is damaged, is compiled anew.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import serialize_executable

import imagen_jax
from imagen_jax import compiler, sharding
from imagen_jax.dtypes import NUMERICS
from imagen_jax.io import files, paths

FOLDER, MOST = 'programs', 64  # files that are kept
MAGIC = b'imagen_jax program 2\n'
LENGTH = len(MAGIC) + 64
BEGAN = time.time()  # about when this process imported the package
NOTE = 8  # bytes of the length of a program's note
# jax's settings, besides `NUMERICS`, and the source code, on which a sampling
# program depends.
OPTIONS = ('jax_default_matmul_precision', 'jax_disable_most_optimizations')
CODE = (
  'cascade', 'diffusion', 'nets', 'collectives.py', 'compiler.py', 'dtypes.py',
  'sharding.py',
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
    key = _key(args)
    with self._lock:
      if key not in self._made:
        self._made[key] = self._load_or_compile(args)
      return self._made[key]

  def __len__(self) -> int:
    """The number of compiled programs, one for each set of shapes."""
    return len(self._made)

  def __call__(self, *args: Any) -> Any:
    """The function's result."""
    return self.prepare(*args)(*args)

  def _load_or_compile(self, args: tuple[Any, ...]) -> Any:
    place = find_place(self._identity, args)
    if place is None:
      return self._jitted.lower(*args).compile()
    found = place.read(args, lambda note: args[-1])
    if found is None:
      found = self._jit(renamed(self._function)).lower(*args).compile()
      place.write(found)
    return found


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a compiled program is kept.

  Attributes:
    file: its file.
    whole: all that the program depends on.
  """

  file: pathlib.Path
  whole: bytes

  def _content(self) -> tuple[dict, memoryview] | None:
    """(note, program); None if it is missing, damaged or another's."""
    try:
      data = memoryview(self.file.read_bytes())
    except OSError:
      return None
    body = data[LENGTH:]
    if data[:LENGTH] != self._head(body):
      return None
    size = int.from_bytes(body[:NOTE], 'little')
    note = json.loads(bytes(body[NOTE : NOTE + size]))
    return note, body[NOTE + size :]

  @property
  def note(self) -> dict | None:
    """What was kept beside the program; None without a program."""
    content = self._content()
    return content and content[0]

  def read(self, args: Any, result: Callable[[dict], Any]) -> Any | None:
    """The program, loaded; None if there is none.

    Args:
      args: tuple of its arguments.
      result: of the note, a tree of the structure of the program's result.
    """
    content = self._content()
    if content is None:
      return None
    note, body = content
    mesh = jax.sharding.get_mesh()
    devices = jax.devices()[:1] if mesh.empty else [*mesh.devices.flat]
    given, made = (
      jax.tree.structure((args, {})),
      jax.tree.structure(result(note)),
    )
    try:
      found = serialize_executable.deserialize_and_load(
        body, given, made, execution_devices=devices
      )
    except Exception:  # XLA's, of many types
      return None
    with contextlib.suppress(OSError):  # of another process, or read-only
      os.utime(self.file)  # the longest unused are removed
    return found

  def write(self, program: Any, note: dict | None = None) -> None:
    """Keeps a program if it can be, and removes the longest unused ones.

    Args:
      program: the compiled function.
      note: of JSON's types.
    """
    text = json.dumps(note or {}).encode()
    try:
      body, _, _ = serialize_executable.serialize(program)
      body = len(text).to_bytes(NOTE, 'little') + text + body
      files.write_bytes(self.file, self._head(body) + body)
      kept = self.file.parent.iterdir()
      by_use = sorted(kept, key=lambda path: path.stat().st_mtime)
      for path in by_use[:-MOST]:
        path.unlink()
    except Exception:  # a full disk; XLA's, of many types
      return

  def _head(self, body: bytes | memoryview) -> bytes:
    """The first `LENGTH` bytes: a mark, what the program is, its digest."""
    return MAGIC + b''.join(
      hashlib.sha256(x).digest() for x in (self.whole, body)
    )


def find_place(
  identity: str | None, args: tuple[Any, ...], code: tuple[str, ...] = CODE
) -> Place | None:
  """Where a program is kept; None where it cannot be.

  Args:
    identity: what it depends on besides its arguments and `code`; None:
      unknown.
    args: its arguments, or `jax.ShapeDtypeStruct`s with shardings.
    code: files and folders of the package.
  """
  folder = find_folder() if identity is not None else None
  if folder is None:
    return None
  source = _code(code)
  if source is None:
    return None
  data = '\n'.join((_machine(), source, str(identity), _key(args))).encode()
  return Place(folder / hashlib.sha256(data).hexdigest(), data)


def renamed(function: Callable) -> Callable:
  """The function with a name of its own, of which jax's cache has no program.

  On a CPU one that has been on disk cannot be written there again.
  """
  new = lambda *args: function(*args)
  new.__name__ = f'{function.__name__}_{secrets.token_hex(8)}'
  return new


def _key(args: tuple[Any, ...]) -> str:
  """Shapes, types and shardings of arguments, the mesh, and jax's settings."""
  leaves, tree = jax.tree.flatten(args)
  kind = lambda x: (x.shape, x.dtype, getattr(x, 'sharding', None))
  setting = lambda name: getattr(jax.config, name, jax.config.values[name])
  options = [str(setting(name)) for name in (*NUMERICS, *OPTIONS)]
  return f'{tree} {[kind(leaf) for leaf in leaves]} {_mesh()} {options}'


def find_folder() -> pathlib.Path | None:
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
      *(
        importlib.metadata.version(name)
        for name in ('jax', 'jaxlib', 'flax', 'optax')
      ),
      device.client.platform_version,
      device.device_kind,
      len(jax.devices()),
      sharding.usable_cores(),
      [os.environ.get(name) for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')],
      compiler.sampling_options(),
      features,
    ]
  )


@functools.cache
def _code(names: tuple[str, ...]) -> str | None:
  """A digest of the source code of files and folders of the package.

  None if it was changed after this process began: what runs may be older.
  """
  root = pathlib.Path(imagen_jax.__file__).parent
  digest = hashlib.sha256()
  for name in names:
    path = root / name
    for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
      if file.stat().st_mtime > BEGAN:
        return None
      digest.update(f'{file.relative_to(root)}\n'.encode() + file.read_bytes())
  return digest.hexdigest()
