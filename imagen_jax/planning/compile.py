"""Compiles a step for a pod with the real TPU compiler, without a TPU.

libtpu compiles for any slice, given its topology, and reports memory, FLOPs
and communication.
"""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax

from imagen_jax import sharding
from imagen_jax.errors import UsageError
from imagen_jax.planning import job
from imagen_jax.training import chips

# Slice types, which libtpu requires; the compiled program depends on the
# topology's name only.
ACCELERATORS = {
  'v4': 'v4-{cores}',
  'v5e': 'v5litepod-{chips}',
  'v5p': 'v5p-{cores}',
  'v6e': 'v6e-{chips}',
}
LEVELS = ('jax_optimization_level', 'jax_memory_fitting_level')
_COLLECTIVE = re.compile(
  '= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)'
  r'(-start)?\('
)
_SHAPE = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_SIZES = {
  'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
  's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
  """The compiler's report on one step, per device.

  Attributes:
    arguments: bytes of parameters, state and batch.
    outputs: bytes of results that do not alias arguments.
    temporaries: bytes of intermediate values.
    flops: FLOPs; the bodies of loops count once.
    bytes_accessed: to and from memory; the bodies of loops count once.
    collectives: {kind: (number, bytes)}; the bodies of loops count once; None
      if jaxlib cannot read the program.
    lower_seconds: time of tracing and lowering.
    compile_seconds: time of compiling.
  """

  arguments: int
  outputs: int
  temporaries: int
  flops: float
  bytes_accessed: float
  collectives: dict[str, tuple[int, int]] | None
  lower_seconds: float
  compile_seconds: float

  @property
  def total(self) -> int:
    """Memory of a device, in bytes."""
    return self.arguments + self.outputs + self.temporaries


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """The devices of slices that need not exist.

  Args:
    topology: such as 'v5e:4x4'.
    slices: number of slices of that shape.

  Raises:
    UsageError: libtpu is missing, or knows no such slice.
  """
  chip, count = chips.parse_topology(topology)
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise UsageError(
      'compile needs the TPU compiler, which is not installed: '
      "pip install 'imagen_jax[plan]'.",
      key='compile',
    ) from error
  cores = 2 * count if chip.name in ('v4', 'v5p') else count
  accelerator = ACCELERATORS[chip.name].format(chips=count, cores=cores)
  # Not a TPU machine: libtpu must not query its metadata.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # Its lock protects chips from shared use; there are no chips here.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ['TPU_ACCELERATOR_TYPE'] = accelerator
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  from jax.experimental import topologies

  # The two cores of a v4 chip are one device, as in training.
  options: dict[str, Any] = {'num_slices': slices} if slices > 1 else {}
  if chip.name == 'v4':
    options['chip_config_name'] = 'megacore'
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise UsageError(
      f'libtpu knows no slice {topology}: {str(error).splitlines()[0]}; try '
      f'{", ".join(chips.EXAMPLES)}.'
    ) from error


def compile_step(
  work: job.Job,
  topology: str,
  *,
  fsdp: int = 1,
  step: str = 'train',
  effort: str = 'full',
) -> Compiled:
  """Compiles a job's step for a slice.

  Args:
    work: the `job.Job`.
    topology: such as 'v5e:4x4'.
    fsdp: size of that axis of the mesh; the other has the remaining devices.
    step: 'train' or 'sample'.
    effort: 'full', as for a real run, or 'low', which is faster and still
      partitions the program and assigns memory.

  Raises:
    UsageError: an impossible slice, mesh or batch.
    jax.errors.JaxRuntimeError: the program does not fit (RESOURCE_EXHAUSTED).
  """
  mesh = sharding.make_mesh(fsdp=fsdp, devices=topology_devices(topology))
  parts = work.accumulate if step == 'train' else 1
  sharding.check_batch_size(work.batch_size, mesh, parts)
  start = time.perf_counter()
  lower = {'train': job.lower_train, 'sample': job.lower_sample}[step]
  lowered = lower(work, mesh)
  middle = time.perf_counter()
  with _effort(effort):
    compiled = lowered.compile()
  end = time.perf_counter()
  memory: Any = compiled.memory_analysis()
  cost: Any = compiled.cost_analysis()
  return Compiled(
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    flops=cost.get('flops', 0.0),
    bytes_accessed=cost.get('bytes accessed', 0.0),
    collectives=_listed(compiled),
    lower_seconds=middle - start,
    compile_seconds=end - middle,
  )


def _listed(compiled: jax.stages.Compiled) -> dict[str, tuple[int, int]] | None:
  try:
    return collectives(compiled.as_text() or '')
  except jax.errors.JaxRuntimeError:
    # jaxlib cannot always read what a newer libtpu compiled.
    return None


@contextlib.contextmanager
def _effort(effort: str) -> Iterator[None]:
  before = {name: getattr(jax.config, name) for name in LEVELS}
  for name in LEVELS if effort == 'low' else ():
    jax.config.update(name, 'O0')
  try:
    yield
  finally:
    for name, level in before.items():
      jax.config.update(name, level)


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """{kind: (number, bytes)} of the communication in a compiled module's text.

  The bytes are those of the results. An asynchronous operation returns its
  operands too: of its arrays, the largest counts.
  """
  found: dict[str, tuple[int, int]] = {}
  for line in text.splitlines():
    if match := _COLLECTIVE.search(line):
      shapes, kind, started = match.groups()
      sizes = [_bytes(*shape) for shape in _SHAPE.findall(shapes)]
      size = max(sizes, default=0) if started else sum(sizes)
      count, total = found.get(kind, (0, 0))
      found[kind] = (count + 1, total + size)
  return found


def _bytes(dtype: str, dims: str) -> int:
  """Bytes of an array such as ('bf16', '4,8')."""
  return _SIZES.get(dtype, 0) * math.prod(int(n) for n in dims.split(',') if n)


def out_of_memory(error: Exception) -> str:
  """The compiler's message on the missing memory."""
  match = re.search(r'(Used .*? of .*?(?:hbm|HBM)[^\n]*)', str(error))
  return match[1].strip(' .') if match else str(error).splitlines()[0]
