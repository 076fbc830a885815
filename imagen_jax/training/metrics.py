"""Metrics as JSON lines, and one progress line per logged step."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from imagen_jax.io import files
from imagen_jax.training import ledger as ledgers
from imagen_jax.training import pace
from imagen_jax.training.ledger import Ledger
from imagen_jax.training.loggers import Grid, Logger

Results = Mapping[str, Any]  # the metrics of one step, see `make_train_step`
# Parts of the wall time over which images/s are counted.
TRAINING = ('step', 'data_wait', 'save', 'other')


@dataclasses.dataclass
class Metrics:
  """Writes `metrics.jsonl`, progress lines and loggers (process 0 only).

  A resumed run first drops the lines after the step it resumes from, so the
  file reads as one uninterrupted run.

  Attributes:
    path: of `metrics.jsonl`.
    ledger: of the run's wall time.
    start_step: the step that the run resumes from.
    num_steps: the step at which it ends.
    write: whether this process writes.
    devices: number of devices that run a step.
    flops: FLOPs of a step over all devices, or None.
    model_flops: those without rematerialization.
    spared: see `Experiment.spared_flops`.
    peak: peak FLOPs per second of a device, or None.
    loggers: from `loggers.make_loggers`.
  """

  path: pathlib.Path
  ledger: Ledger
  _: dataclasses.KW_ONLY
  start_step: int
  num_steps: int
  write: bool = True
  devices: int = 1
  flops: float | None = None
  model_flops: float = 0.0
  spared: Sequence[float] = ()
  peak: float | None = None
  loggers: Sequence[Logger] = ()

  def __post_init__(self) -> None:
    self.start(self.start_step)
    if self.write and self.path.exists():
      rows = files.read_lines(self.path, fields={'step': int})
      kept = (row for row in rows if row['step'] <= self.start_step)
      files.write_lines(self.path, kept)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    for logger in self.loggers:
      logger.close()

  def log(
    self,
    step: int,
    images: int,
    recent: Sequence[Results],
    paced: Sequence[pace.Step],
    **values: float,
  ) -> None:
    """Writes one line for the steps since the previous line.

    Every process calls it.

    Args:
      step: the last of them.
      images: images per step.
      recent: the metrics that `train_step` returned for them, on the devices.
      paced: how long they took.
      **values: further numbers for the line.
    """
    recent = jax.device_get(recent)
    slow = self._compare(paced)
    before, steps = self._spent, step - self._step
    self.start(step)
    if not self.write:
      return
    spent = {part: self._spent[part] - before[part] for part in TRAINING}
    seconds = max(sum(spent.values()), 1e-9)
    row: dict[str, Any] = {'step': step, **_means(recent), **values}
    row |= self._speed(images, steps, seconds, recent)
    row['data_wait_percent'] = round(100 * spent['data_wait'] / seconds, 1)
    row |= _pace(paced, slow)
    row['goodput_percent'] = round(ledgers.goodput(self._spent), 2)
    row |= {f'seconds_{part}': value for part, value in self._spent.items()}
    row['time'] = round(time.time(), 3)
    files.append_line(self.path, row)
    self.ledger.write()
    del row['step']
    for logger in self.loggers:
      logger.scalars(step, row)
    left = ledgers.duration((self.num_steps - step) * seconds / max(steps, 1))
    print(
      f'step {step}/{self.num_steps}  {_line(row)}  {left} left',
      file=sys.stderr,
      flush=True,
    )

  def _compare(self, paced: Sequence[pace.Step]) -> pace.SlowHost | None:
    """A host that is slow, for whose data the others have waited."""
    hosts = pace.gather(paced)
    if hosts is None:
      return None
    waited = hosts[:, 1].max() - np.mean([step.data for step in paced])
    self.ledger.move(waited * len(paced), 'step', 'data_wait')
    return pace.find_slow(hosts)

  def _speed(
    self, images: int, steps: int, seconds: float, recent: Sequence[Results]
  ) -> dict[str, float]:
    """Images and FLOPs per second, and fractions of the peak."""
    rate = images * steps / seconds
    row = {
      'images_per_sec': round(rate, 2),
      'images_per_sec_per_device': round(rate / self.devices, 3),
    }
    if self.flops and steps:
      spared = 0.0
      if len(self.spared) and recent:
        ran = np.mean([values['text_buckets'] for values in recent], axis=0)
        spared = float(ran @ np.array(self.spared))
      model, hardware = (
        (flops - spared) * steps / seconds / self.devices
        for flops in (self.model_flops, self.flops)
      )
      row['tflops_per_device'] = float(f'{model / 1e12:.4g}')
      if self.peak:
        row['mfu_percent'] = round(100 * model / self.peak, 2)
        row['hfu_percent'] = round(100 * hardware / self.peak, 2)
    return row

  def image(self, step: int, grid: Grid) -> None:
    """Sends a grid of samples to the loggers."""
    for logger in self.loggers:
      logger.image(step, grid)

  def start(self, step: int) -> None:
    """Starts the line that follows `step`."""
    self._step, self._spent = step, self.ledger.read()


def _pace(
  paced: Sequence[pace.Step], slow: pace.SlowHost | None
) -> dict[str, float]:
  """Percentiles of the seconds of a step, and the host that is slow."""
  row: dict[str, float] = {}
  if paced:
    found = np.percentile([step.total for step in paced], (50, 99))
    for name, value in zip(('p50', 'p99'), found):
      row[f'step_seconds_{name}'] = float(f'{value:.4g}')
  if slow:
    row['slow_host'], row['slow_host_ratio'] = slow.host, round(slow.ratio, 2)
    row['slow_host_data_percent'] = round(100 * slow.data)
  return row


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
  if 'slow_host' in row:
    parts.append(
      f'the host of process {row["slow_host"]} is slow: '
      f'{row["slow_host_ratio"]:.2f} × the median, '
      f'{row["slow_host_data_percent"]} % of its delay is waiting for data'
    )
  return '  '.join(parts)
