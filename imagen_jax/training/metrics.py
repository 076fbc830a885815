"""Metrics as JSON lines, and one progress line per logged step."""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from imagen_jax.io import files
from imagen_jax.training.loggers import Grid, Logger

Results = Mapping[str, Any]  # the metrics of one step, see `make_train_step`


@dataclasses.dataclass
class Metrics:
  """Writes `metrics.jsonl`, progress lines and loggers (process 0 only).

  A resumed run first drops the lines after the step it resumes from, so the
  file reads as one uninterrupted run.

  Attributes:
    path: of `metrics.jsonl`.
    start_step: the step that the run resumes from.
    num_steps: the step at which it ends.
    write: whether this process writes.
    devices: number of devices that run a step.
    flops: FLOPs of a step over all devices, or None.
    peak: peak FLOPs per second of a device, or None.
    loggers: from `loggers.make_loggers`.
  """

  path: pathlib.Path
  _: dataclasses.KW_ONLY
  start_step: int
  num_steps: int
  write: bool = True
  devices: int = 1
  flops: float | None = None
  peak: float | None = None
  loggers: Sequence[Logger] = ()

  def __post_init__(self) -> None:
    self.start(self.start_step)
    if self.write and self.path.exists():
      rows = files.read_lines(self.path, fields={'step': int})
      kept = (json.dumps(row) for row in rows if row['step'] <= self.start_step)
      files.write_text(self.path, ''.join(f'{line}\n' for line in kept))

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    for logger in self.loggers:
      logger.close()

  def log(
    self, step: int, images: int, recent: Sequence[Results], **values: float
  ) -> None:
    """Writes one line for the steps since the previous line.

    Args:
      step: the last of them.
      images: images per step.
      recent: the metrics that `train_step` returned for them, on the devices.
      **values: further numbers for the line.
    """
    recent = jax.device_get(recent)
    now = time.perf_counter()
    seconds = max(now - self._time, 1e-9)
    steps = step - self._step
    waited = self._waited / seconds
    self.start(step)
    if not self.write:
      return
    rate = images * steps / seconds
    row: dict[str, Any] = {'step': step, **_means(recent), **values}
    row['images_per_sec'] = round(rate, 2)
    row['images_per_sec_per_device'] = round(rate / self.devices, 3)
    row['data_wait_percent'] = round(100 * waited, 1)
    if self.flops and steps:
      done = self.flops * steps / seconds / self.devices
      row['tflops_per_device'] = float(f'{done / 1e12:.4g}')
      if self.peak:
        row['mfu_percent'] = round(100 * done / self.peak, 2)
    files.append_text(self.path, json.dumps(row) + '\n')
    del row['step']
    for logger in self.loggers:
      logger.scalars(step, row)
    left = (self.num_steps - step) * seconds / max(steps, 1)
    print(
      f'step {step}/{self.num_steps}  {_line(row)}  {_minutes(left)} left',
      file=sys.stderr,
      flush=True,
    )

  def image(self, step: int, grid: Grid) -> None:
    """Sends a grid of samples to the loggers."""
    for logger in self.loggers:
      logger.image(step, grid)

  def waited(self, seconds: float) -> None:
    """Adds time that a step waited for its batch."""
    self._waited += seconds

  def start(self, step: int) -> None:
    """Starts the clock at `step`."""
    self._time, self._step = time.perf_counter(), step
    self._waited = 0.0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops the clock, for work that is not training."""
    paused = time.perf_counter()
    yield
    self._time += time.perf_counter() - paused


def _means(recent: Sequence[Results]) -> dict[str, float | None]:
  """The metrics of several steps in one dict, losses as means."""
  if not recent:
    return {}
  # Skipped steps count only as `skipped`.
  good = [v for v in recent if np.isfinite(v['loss'] + v['grad_norm'])]
  row: dict[str, float | None] = {
    name: float(np.mean([values[name] for values in good])) if good else None
    for name in ('loss', 'grad_norm')
  }
  row['param_norm'] = float(recent[-1]['param_norm'])
  row['skipped'] = int(recent[-1]['skipped'])
  if not good:
    return row
  count = np.sum([values['band_count'] for values in good], axis=0)
  total = np.sum([values['band_loss'] for values in good], axis=0)
  for i, (loss, n) in enumerate(zip(total, count)):
    if n:  # a small batch can leave a band empty
      low, high = i / len(count), (i + 1) / len(count)
      row[f'loss_t{low:g}-{high:g}'] = float(loss / n)
  return row


def _line(row: Mapping[str, Any]) -> str:
  """The main metrics, as one progress line."""
  parts = []
  for name, key in (
    ('loss', 'loss'),
    ('held-out', 'heldout_loss_ema'),
    ('grad_norm', 'grad_norm'),
    ('skipped', 'skipped'),
    ('bad samples', 'bad_samples'),
  ):
    value = row.get(key)
    if value or key == 'loss':
      parts.append(f'{name} {value:.4g}' if value else f'{name} none')
  parts.append(f'{row["images_per_sec"]:.1f} images/s')
  if 'mfu_percent' in row:
    parts.append(f'MFU {row["mfu_percent"]:.1f} %')
  if row['data_wait_percent'] >= 1:
    parts.append(f'data wait {row["data_wait_percent"]:.0f} %')
  return '  '.join(parts)


def _minutes(seconds: float) -> str:
  minutes, rest = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{rest:02d}s'
