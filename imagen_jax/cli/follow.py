"""evaluate.py --follow: scores the checkpoints of a run as they appear."""

import dataclasses
import json
import pathlib
import shutil
import time

from imagen_jax.errors import ModelError, UsageError
from imagen_jax.evaluation import run
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.listener import Listener
from imagen_jax.io import files, manifest, model_folder, text_folder
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.io.paths import check_folder
from imagen_jax.training.experiment import Export, find_experiment

POLL = 30.0  # seconds between two looks at the checkpoints
FILE, SETTINGS = 'scores.jsonl', 'settings.json'


def follow(
  workdir: pathlib.Path, config: EvalConfig, listener: Listener
) -> None:
  """Scores new checkpoints until the one of the run's last step is scored.

  The newest comes first; one that the run removes before its turn is left out.
  In `config.out`, each has a folder with what an evaluation writes, and a line
  in `scores.jsonl`. Steps with a line are not scored again.

  Args:
    workdir: of a training.
    config: of the evaluation, without a model.
    listener: receives notes and progress.

  Raises:
    UsageError: the folder is not that of a training, or the scores in
      `config.out` are of other settings.
    UsageError, DataError, ModelError: see `run.evaluate`.
  """
  out = check_folder(config.out, key='out')  # before a checkpoint is awaited
  record = model_folder.load_stage(workdir)
  if record.weights is not None:
    raise UsageError(
      f'{workdir} is an exported stage, which does not change; give it as '
      'model instead.',
      key='follow',
    )
  _check_settings(out, config)
  while True:
    lines = out / FILE
    rows = (
      files.read_lines(lines, fields={'step': int}) if lines.exists() else ()
    )
    done = {row['step'] for row in rows}
    steps = _steps(record)
    if left := [step for step in steps if step not in done]:
      if not _score(record, left[0], config, listener):
        continue
    elif max(done, default=-1) >= _num_steps(workdir):
      return
    else:
      time.sleep(POLL)


def _check_settings(out: pathlib.Path, config: EvalConfig) -> None:
  """Refuses to add scores to those that were made with other settings."""
  fields = dataclasses.asdict(dataclasses.replace(config, model=None, out=''))
  asked = json.loads(json.dumps(fields, default=str))
  path = out / SETTINGS
  found = files.read_json(path) if path.exists() else asked
  changed = [k for k in asked if found.get(k, asked[k]) != asked[k]]
  if changed:
    raise UsageError(
      f'the scores in {out} are of other settings ({", ".join(changed)}); give '
      'the same, or another folder.',
      key='out',
    )
  files.make_folder(out)
  files.write_json(path, asked)


def _score(
  record: StageRecord, step: int, config: EvalConfig, listener: Listener
) -> bool:
  """Scores a checkpoint; False if it was removed before it was read."""
  listener.note(f'step {step} of {record.path}')
  out = pathlib.Path(config.out)
  model = out / '.model'
  try:
    _export(record, step, model)
  except ModelError:
    if step in _steps(record):
      raise
    listener.note(f'step {step} was removed before its turn')
    return False
  folder = out / f'step_{step:07d}'
  done = dataclasses.replace(config, model=model, out=folder)
  scores = run.evaluate(done, listener).scores
  files.append_line(out / FILE, {'step': step, **scores})
  shutil.rmtree(model)
  return True


def _export(record: StageRecord, step: int, model: pathlib.Path) -> None:
  """Exports a checkpoint, so that the run may remove it."""
  if model.exists():  # of an interrupted evaluation
    shutil.rmtree(model)
  model.mkdir(parents=True)
  text = text_folder.of_stage(record.path.parent, record)
  (model / 'text').symlink_to(text.absolute(), target_is_directory=True)
  request = Export(
    workdir=record.path, out=model / record.name, step=step, dtype='float32'
  )
  find_experiment(record.config['kind']).export(request)


def _steps(record: StageRecord) -> list[int]:
  """The run's complete checkpoints, the newest first."""
  folder = model_folder.checkpoint_folder(record.path, record.config)
  return [*manifest.whole_steps(folder)]


def _num_steps(workdir: pathlib.Path) -> int:
  """The last step of the run, which may have been extended."""
  return model_folder.load_config(workdir)['config']['train']['num_steps']
