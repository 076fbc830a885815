"""The setup of every command, before jax starts."""

import argparse
import logging
import os

from imagen_jax.cli import errors, output
from imagen_jax.errors import ImagenError, UsageError
from imagen_jax.io import paths


def add_process_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of a job of several processes."""
  group = parser.add_argument_group(
    'several processes', 'Start the same command once per host.'
  )
  group.add_argument(
    '--distributed',
    action='store_true',
    help='find the other processes through the TPU pod, SLURM, Open MPI or '
    'Kubernetes',
  )
  group.add_argument(
    '--coordinator', help='host:port of process 0, without --distributed'
  )
  group.add_argument('--num_processes', type=int, help='with --coordinator')
  group.add_argument('--process_id', type=int, help='with --coordinator')


def start(
  *, split_cpu: bool = False, processes: argparse.Namespace | None = None
) -> None:
  """Sets up numerics, compilation cache, logs, CPU devices and processes.

  Args:
    split_cpu: one virtual device per CPU core, for training; sampling a few
      images is faster with all cores as one device.
    processes: parsed arguments with the flags of `add_process_flags`.

  Raises:
    UsageError: the flags contradict each other, or the platform that the
      environment chooses is not there.
    ImagenError: of a job of several processes, which another attempt may mend:
      they do not find each other, or this one finds no device.
  """
  import jax

  from imagen_jax import sharding

  _pin_numerics()
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = paths.cache_folder()
    if cache is not None:
      jax.config.update('jax_compilation_cache_dir', str(cache / 'compile'))
  elif '://' in os.environ['JAX_COMPILATION_CACHE_DIR']:
    # jax reads and writes programs in a bucket, XLA none of its own files.
    jax.config.update('jax_persistent_cache_enable_xla_caches', '')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  # A machine without a TPU or GPU is a normal place to run.
  logging.getLogger('jax._src.xla_bridge').setLevel(logging.ERROR)
  if split_cpu:
    sharding.set_cpu_devices()
  if processes is not None:
    _join(processes)
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    kind = ImagenError if jax.distributed.is_initialized() else UsageError
    raise kind(
      f'jax finds no device ({reason[:200]}); check the environment: '
      f'JAX_PLATFORMS is {os.environ.get("JAX_PLATFORMS", "unset")}.'
    ) from error
  errors.catch_interrupts()


def _pin_numerics() -> None:
  """Sets `NUMERICS`, with a note on each that the environment had changed."""
  import jax

  from imagen_jax.dtypes import NUMERICS

  for name, value in NUMERICS.items():
    found = getattr(jax.config, name)
    if getattr(found, 'value', found) != value:
      jax.config.update(name, value)
      output.note(f'{name.upper()}={found} has no effect here; it is {value}.')


def _join(args: argparse.Namespace) -> None:
  """Joins the job's processes; must come before jax uses any device."""
  by_hand = (args.coordinator, args.num_processes, args.process_id)
  if not args.distributed and by_hand == (None, None, None):
    return
  if args.distributed and by_hand != (None, None, None):
    raise UsageError(
      '--distributed finds the other processes by itself: leave out '
      '--coordinator, --num_processes and --process_id, or give them alone.'
    )
  if not args.distributed and None in by_hand:
    raise UsageError(
      'processes started by hand need all of --coordinator HOST:PORT, '
      '--num_processes and --process_id.'
    )
  if args.coordinator and not 0 <= args.process_id < args.num_processes:
    raise UsageError(
      f'--process_id {args.process_id} is not one of the '
      f'{args.num_processes} processes; they are numbered from 0.'
    )
  import jax

  try:
    jax.distributed.initialize(*by_hand)
  except (RuntimeError, ValueError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    # A process may be late, since its host starts anew, say.
    kind = ImagenError if isinstance(error, RuntimeError) else UsageError
    raise kind(
      f'the processes of this job did not find one another ({reason[:200]}); '
      'check that every host runs the same command and that process 0 can be '
      'reached' + (f' at {args.coordinator}.' if args.coordinator else '.')
    ) from error
