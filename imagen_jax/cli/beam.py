"""Apache Beam as the driver of imagen-prepare: each element is one shard."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from imagen_jax.errors import ImagenError, UsageError

LOCAL = 'DirectRunner'


def run(
  work: Callable[[Any], Any],
  shards: Sequence[Any],
  runner: str,
  options: Sequence[str],
  workers: int,
) -> None:
  """Calls `work(shard)` on Beam's workers, and waits for all.

  Nothing large crosses workers: a shard is a name, and what `work` returns is
  dropped. A worker needs this package, and reads and writes as this process
  would.

  Args:
    work: idempotent and picklable; it does not raise for a bad shard.
    shards: picklable.
    runner: the name of a Beam runner.
    options: of Beam, such as '--project=mine'.
    workers: processes of the DirectRunner, unless the options say otherwise.

  Raises:
    UsageError: Beam is not installed, or does not know the runner.
    ImagenError: the pipeline failed, as when its workers cannot be started.
  """
  try:
    import apache_beam as beam
    from apache_beam.options import pipeline_options
  except ImportError as error:
    raise UsageError(
      f'needs a package that is not installed ({error.name}): pip install '
      "'imagen_jax[beam]'.",
      key='runner',
    ) from error
  words = [f'--runner={runner}', *options]
  if runner == LOCAL and not any('direct_' in option for option in options):
    words += [f'--direct_num_workers={workers}']
    words += ['--direct_running_mode=multi_processing']
    words += ['--default_sdk_harness_log_level=ERROR']
  logging.getLogger('apache_beam').setLevel(logging.ERROR)
  try:
    flags = pipeline_options.PipelineOptions(words)
    with beam.Pipeline(options=flags) as pipeline:
      # Reshuffled, so that each shard goes to whichever worker is free.
      shards_ = pipeline | 'Shards' >> beam.Create(list(shards))
      spread = shards_ | 'Spread' >> beam.Reshuffle()
      _ = spread | 'Prepare' >> beam.Map(work)
  except ValueError as error:
    raise UsageError(f'Beam refuses this ({error}).', key='runner') from error
  except (RuntimeError, ImportError, OSError) as error:
    text = ' '.join(str(error).split())[-500:]
    raise ImagenError(
      f'the Beam pipeline failed ({text}); what was prepared is kept, so run '
      'the same command again.'
    ) from error
