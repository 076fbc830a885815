"""Ends a run whose steps keep giving NaN or Inf."""

import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from imagen_jax.data.source import Source
from imagen_jax.errors import NumericError
from imagen_jax.io import files
from imagen_jax.training.state import TrainState


def check_finite(
  state: TrainState,
  step: int,
  limit: int,
  seen: Iterable[tuple[int, np.ndarray]],
  source: Source,
  workdir: pathlib.Path,
) -> None:
  """Ends a run whose last `limit` steps were all skipped.

  Args:
    state: the `TrainState`.
    step: the last step.
    limit: number of skipped steps in a row that ends the run.
    seen: [(step, indices of its images in the source)] of the latest steps.
    source: of the images.
    workdir: where `bad_batches_PROCESS.jsonl` is written.

  Raises:
    NumericError: the message names images of the last batch.
  """
  bad = int(state.skipped_in_row)
  if bad < limit:
    return
  rows: list[dict[str, Any]] = [
    {'step': number, 'samples': [source.name(int(i)) for i in index]}
    for number, index in seen
  ]
  file = workdir / f'bad_batches_{jax.process_index()}.jsonl'
  files.write_lines(file, rows)
  some = rows[-1]['samples']
  raise NumericError(
    f'the last {bad} steps up to step {step} gave NaN or Inf and were skipped; '
    'resume from the last checkpoint with a lower '
    'train.optimizer.learning_rate, or look at the images: the last batch held '
    f'{", ".join(some[:4])}{", …" if len(some) > 4 else ""}, and {file} lists '
    'all of them.'
  )
