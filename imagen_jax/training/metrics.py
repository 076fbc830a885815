"""Metrics as JSON lines, and one progress line per logged step."""

import json
import pathlib
import sys
import time


class Metrics:
  """Writes `metrics.jsonl` and progress lines (process 0 only).

  A resumed run first drops the lines after the step it resumes from, so the
  file reads as one uninterrupted run.
  """

  def __init__(self, path, *, start_step, num_steps, write=True):
    self._path = pathlib.Path(path)
    self._num_steps = num_steps
    self._write = write
    self._time = time.perf_counter()
    self._step = start_step
    if write and self._path.exists():
      _drop_after(self._path, start_step)

  def log(self, step, images, **values):
    """Adds one line: step, images_per_sec since the last call, `values`."""
    now = time.perf_counter()
    seconds = now - self._time
    steps = step - self._step
    self._time, self._step = now, step
    rate = images * steps / max(seconds, 1e-9)
    row = {'step': step, **values, 'images_per_sec': round(rate, 2)}
    if not self._write:
      return
    with self._path.open('a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')
    left = (self._num_steps - step) * seconds / max(steps, 1)
    text = '  '.join(f'{k} {v:.4g}' for k, v in values.items())
    print(
      f'step {step}/{self._num_steps}  {text}  {rate:.1f} images/s  '
      f'{_minutes(left)} left',
      file=sys.stderr,
      flush=True,
    )

  def start(self, step):
    """Starts the clock at `step`."""
    self._time, self._step = time.perf_counter(), step

  def pause(self):
    """Leaves out what happened since `log`: it was not training."""
    self._time = time.perf_counter()


def _minutes(seconds):
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{seconds:02d}s'


def _drop_after(path, step):
  kept = []
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except (ValueError, KeyError, TypeError):
      continue  # a line cut short by a kill
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(kept), encoding='utf-8')
  temporary.replace(path)
