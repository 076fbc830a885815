"""A process of `accelerator.py`: compiles its rows together, times each alone.

An `accelerator_{module}.py` has a class `Work`. `Work(given, rehearse)` and
`compile()` run in threads, beside those of other rows. `measure()` then gives
the numbers of a row, alone.
"""

import concurrent.futures
import functools
import gc
import importlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.training.chips import find_peak

WARM, QUICK = 3, 2.0  # calls that are not timed; one if it takes longer
FEWEST, MOST, SECONDS = 3, 20, 6.0  # calls that are timed, and for how long
SLOW = 15.0  # seconds of a call from which on it is not repeated
BLOCK = 2**22  # random numbers, which large arrays repeat
GIB = 2**30
_hits: set[int] = set()  # threads whose program came from the cache


class LeftOut(Exception):
  """A row that cannot be measured here; the message is for the table."""


class Work(Protocol):
  """One row."""

  def __init__(self, given: Mapping[str, Any], rehearse: bool) -> None: ...

  def compile(self) -> None:
    """Traces and compiles; a table has its time."""

  def measure(self) -> dict[str, Any]:
    """The row's numbers; nothing else runs."""


def serve(
  module: str, rows: Mapping[str, Mapping], flags: str, rehearse: bool
) -> None:
  """Measures rows, and writes a JSON line for each to stdout.

  The first line is of the machine.

  Args:
    module: see above.
    rows: {name: what `Work` is given}.
    flags: of XLA, which the process has been started with.
    rehearse: with tiny work.
  """
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print is not an answer

  def say(**values: object) -> None:
    print(json.dumps(values), file=out, flush=True)

  jax.monitoring.register_event_listener(_listen)
  say(machine=machine())
  if flags and jax.default_backend() == 'tpu':
    for name in rows:
      say(row=name, left_out='flags for GPUs')
    return
  make = importlib.import_module(f'accelerator_{module}').Work
  # XLA has threads of its own, and tracing is done by one at a time.
  workers = max(1, min(len(rows), len(os.sched_getaffinity(0)) // 2))
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    made = {
      name: pool.submit(_compile, make, given, rehearse)
      for name, given in rows.items()
    }
  for name in rows:
    try:
      work, compiled = made.pop(name).result()
      answer = {**compiled, **work.measure()}
    except Exception as error:  # of a library, the compiler or the device
      traceback.print_exc()
      answer = {'left_out': reason(error)}
    say(row=name, **answer)
    work = None  # frees the device's memory
    gc.collect()


def _compile(
  make: Callable[..., Work], given: Mapping, rehearse: bool
) -> tuple[Work, dict[str, Any]]:
  """The compiled work, and how long that took."""
  _hits.discard(threading.get_ident())
  work = make(given, rehearse)
  start = time.perf_counter()
  work.compile()
  seconds = time.perf_counter() - start
  return work, {'compile': seconds, 'cached': threading.get_ident() in _hits}


def _listen(event: str, **_: Any) -> None:
  if event == '/jax/compilation_cache/cache_hits':
    _hits.add(threading.get_ident())
  elif event == '/jax/compilation_cache/cache_misses':
    _hits.discard(threading.get_ident())


def reason(error: BaseException) -> str:
  """An error in one line, for the table."""
  if isinstance(error, LeftOut):
    return str(error)
  if isinstance(error, ImportError):
    return f'{error.name or error} is not installed'
  text = ' '.join(str(error).split())
  full = 'RESOURCE_EXHAUSTED' in text or 'CUDA out of memory' in text
  if full or isinstance(error, MemoryError):
    return f'out of memory: {text[:120]}'
  return f'{type(error).__name__}: {text[:200]}'


def machine() -> dict[str, Any]:
  """Where this is measured, and with what."""
  device = jax.devices()[0]
  memory = device.memory_stats() or {}
  return {
    'device': device.device_kind,
    'platform': device.platform,
    'gib': memory.get('bytes_limit', 0) / GIB,
    'runtime': ' '.join(str(device.client.platform_version).split()),
    'jax': jax.__version__,
    'cores': len(os.sched_getaffinity(0)),
  }


def peak() -> float | None:
  """FLOPs per second of the device; None if unknown."""
  return find_peak(jax.devices()[0].device_kind)


def utilization(flops: float, seconds: float) -> float | None:
  """The fraction of the device's peak."""
  most = peak()
  return flops / seconds / most if most else None


def memory(compiled: jax.stages.Compiled) -> float:
  """GiB that a program needs on the device."""
  used: Any = compiled.memory_analysis()
  return (
    used.argument_size_in_bytes
    + used.output_size_in_bytes
    - used.alias_size_in_bytes
    + used.temp_size_in_bytes
  ) / GIB


def call_times(call: Callable[[], Any], rehearse: bool = False) -> list[float]:
  """Seconds of each of several calls, of which two are under way at a time.

  Args:
    call: returns arrays of the device.
    rehearse: as few as there can be.

  Raises:
    LeftOut: a call takes longer than `SLOW`.
  """
  for _ in range(1 if rehearse else WARM):
    start = time.perf_counter()
    jax.block_until_ready(call())
    single = time.perf_counter() - start
    if single > SLOW:
      raise LeftOut(f'too slow, a call takes {single:.0f} s')
    if single > QUICK:
      break
  number = FEWEST if rehearse else int(SECONDS / single)
  number = min(max(number, FEWEST), MOST)
  ends, before = [], call()
  for _ in range(number):
    after = call()
    jax.block_until_ready(before)
    ends.append(time.perf_counter())
    before = after
  jax.block_until_ready(before)
  ends.append(time.perf_counter())
  return np.diff(ends).tolist()


def median(seconds: list[float]) -> float:
  return float(np.median(seconds))


def random_tree(shapes: Any, shardings: Any = None) -> Any:
  """Arrays like weights, made on the device.

  Kernels are normal with a variance of one over their inputs, biases zero and
  scales one. A large kernel repeats the same numbers.
  """

  def leaf(path: tuple, like: jax.ShapeDtypeStruct, block: jax.Array) -> Any:
    name = str(getattr(path[-1], 'key', path[-1]))
    if name in ('bias', 'scale') or name.endswith('norm'):
      return jnp.full(like.shape, float(name != 'bias'), like.dtype)
    fan = max(1, int(np.prod(like.shape[:-1])))
    repeat = -(-like.size // BLOCK)
    flat = jnp.tile((block * fan**-0.5).astype(like.dtype), repeat)
    return flat[: like.size].reshape(like.shape)

  @functools.partial(jax.jit, out_shardings=shardings)
  def make(key: jax.Array) -> Any:
    block = jax.random.normal(key, (BLOCK,))
    return jax.tree_util.tree_map_with_path(
      lambda path, like: leaf(path, like, block), shapes
    )

  return make(jax.random.key(0))
