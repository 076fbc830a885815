"""Exports a stage from its training workdir to a model folder."""

import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax

from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import files, model_folder, text_folder
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.io.encoder_package import PACKAGES
from imagen_jax.training import power_ema
from imagen_jax.training.experiment import Export


def export_stage(request: Export) -> str:
  """Writes a stage, and beside it the text encoder unless one is there.

  Needs neither the data set nor an accelerator.

  Raises:
    UsageError: the workdir is an exported stage already, or `out` exists.
    ModelError: no checkpoint is good, or `out` cannot be written.
  """
  workdir, out = request.workdir, request.out
  record = model_folder.load_stage(workdir)
  if record.weights is not None:
    raise UsageError(
      f'{workdir} is an exported stage already; give a training workdir.'
    )
  params, step = trained_params(request, record.config)
  text = out.parent / 'text'
  # One of a package is found by its name.
  if record.config['text']['path'] not in PACKAGES and not text.exists():
    source = text_folder.of_stage(workdir.parent, record)
    try:
      with files.replacing(text, error=ModelError) as temporary:
        shutil.copytree(source, temporary, ignore=_not_the_model)
    except ModelError:
      if not text.exists():  # else another export was faster
        raise
  batch_size = record.config['train']['batch_size']
  model_folder.save_stage(
    out,
    params,
    config=record.config,
    text=record.text,
    provenance=provenance(request.command)
    | {
      'steps': step,
      'images': step * batch_size,
      'training_seconds': training_seconds(workdir, step, batch_size),
      'weights': request.described,
    },
    dtype=request.dtype,
  )
  size = (out / 'weights.safetensors').stat().st_size
  return (
    f'{out}: step {step}, {request.described} weights, {size / 1e6:.2f} MB '
    f'{request.dtype}'
  )


def trained_params(
  request: Export, config: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
  """(nested dict of numpy arrays, step) of the weights to export.

  Args:
    request: what to export.
    config: the run's.

  Raises:
    UsageError: see `power_ema.reconstruct`.
    ModelError: no checkpoint is good, or the run has no snapshots.
  """
  directory = model_folder.checkpoint_folder(request.workdir, config)
  if request.ema is not None:
    lengths = config['train'].get('ema_lengths')
    params, step = power_ema.reconstruct(
      directory, lengths, request.ema, request.step
    )
    return model_folder.without_auxiliary(params), step
  part = {'ema': 'ema_params', 'raw': 'params'}[request.weights]
  with Checkpoints(directory) as checkpoints:
    params, _, step = checkpoints.restore_subtree(part, request.step)
  return model_folder.without_auxiliary(params), step


def provenance(command: str) -> dict:
  """How an export was made: command, commit, time, jax version."""
  return {
    'command': command,
    'commit': files.git_commit(),
    'exported': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'jax': jax.__version__,
  }


def training_seconds(
  workdir: pathlib.Path, step: int, batch_size: int
) -> int | None:
  """Seconds of training up to a step; None without the run's metrics."""
  file = workdir / 'metrics.jsonl'
  if not file.exists():
    return None
  last, seconds = 0, 0.0
  fields = {'step': int, 'images_per_sec': int | float}
  for row in files.read_lines(file, fields=fields):
    if row['step'] <= step:
      images = batch_size * (row['step'] - last)
      seconds += images / max(row['images_per_sec'], 1e-9)
      last = row['step']
  return round(seconds)


def _not_the_model(_: str, names: list[str]) -> list[str]:
  """Files in a text encoder's folder that are not part of it."""
  suffixes = ('.json', '.safetensors', '.model', '.txt')  # vocab.txt
  return [n for n in names if not n.endswith(suffixes)]
