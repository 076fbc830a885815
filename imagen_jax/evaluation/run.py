"""Runs an evaluation: from a config to scores and a report.

Example:
  from imagen_jax.evaluation.config import EvalConfig
  from imagen_jax.evaluation.run import evaluate

  result = evaluate(EvalConfig(num=16, sweep={'guidance': (1, 2, 4)}))
"""

import dataclasses
import functools
import os
import pathlib
import time
import typing
from collections.abc import Sequence

import jax

import imagen_jax
from imagen_jax.cascade.cascade import Cascade, load
from imagen_jax.errors import UsageError
from imagen_jax.evaluation import generation, report, scores, suites, sweep
from imagen_jax.evaluation.config import EvalConfig
from imagen_jax.evaluation.listener import Listener
from imagen_jax.evaluation.scores import Categories
from imagen_jax.evaluation.suite import Suite
from imagen_jax.io import model_folder, paths


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The result of an evaluation.

  Attributes:
    scores: {label or label@point: {category: score}} of the finished runs.
    report: the page; None while images of other processes are missing.
  """

  scores: dict[str, Categories]
  report: pathlib.Path | None


def evaluate(
  config: EvalConfig, listener: Listener | None = None
) -> Evaluation:
  """Generates a suite's images, scores them, and writes the report.

  A run that was interrupted resumes when the same config is evaluated again.

  Args:
    config: what to evaluate and how.
    listener: receives notes and progress.

  Raises:
    UsageError, DataError, ModelError: the config contradicts itself or the
      model, or a file that it names cannot be used.
  """
  listener = listener or Listener()
  paths.check_folder(config.out, key='out')
  records = _stages(config)
  suite = suites.make_suite(config, records)
  cascade = load(
    config.model,
    dtype=config.dtype,
    stages=[record.name for record in records],
    devices=jax.local_devices(),  # each process generates its own images
    weak_model=config.weak_model,
  )
  points = sweep.points(cascade, config)
  for note in suite.notes(cascade.stages[-1].resolution):
    listener.note(note)
  found, finished = {}, True
  for name, sampling in points:
    run = _run(config, suite, records, name, sampling)
    identity = _identity(cascade, run)
    generation.open_run(run.folder, identity)
    generation.generate(
      cascade, run, functools.partial(listener.progress, run.label)
    )
    left = generation.unfinished(
      suite.items(), generation.read_records(run.folder)
    )
    if left:
      finished = False
      listener.left(run.label, len(left))
    else:
      provenance = identity | _provenance(config, run, cascade)
      found[run.label] = _score(config, run, provenance)
      listener.scored(run.label, found[run.label])
  page = report.write(pathlib.Path(config.out)) if finished else None
  return Evaluation(found, page)


def _run(
  config: EvalConfig,
  suite: Suite,
  records: Sequence[model_folder.StageRecord],
  name: str,
  sampling: sweep.Sampling,
) -> generation.Run:
  """The run of one point of the sweep."""
  default_batch = 4 if jax.default_backend() == 'cpu' else 32
  return generation.Run(
    suite=suite,
    folder=pathlib.Path(config.out) / suite.label / (name or 'run'),
    name=name,
    sampling=sampling,
    negative_prompt=config.negative_prompt,
    seed=config.seed,
    batch_size=config.batch_size or default_batch,
    fraction=config.shard or (jax.process_index(), jax.process_count()),
    true_size=records[0].low_resolution if config.from_truth else None,
  )


def _stages(config: EvalConfig) -> list[model_folder.StageRecord]:
  """The stages to evaluate; with `from_truth`, super-resolution only."""
  path = paths.located(config.model)
  records = model_folder.find_stages(path, config.stages)
  if not config.from_truth:
    return records
  if not config.stages:
    records = [r for r in records if r.low_resolution is not None]
  if not records or records[0].low_resolution is None:
    raise UsageError(
      f'from_truth needs super-resolution stages only; {path} has none, or '
      'stages names the base.',
      key='from_truth',
    )
  return records


def _identity(cascade: Cascade, run: generation.Run) -> dict[str, typing.Any]:
  """All that the images depend on."""
  return {
    'suite': run.suite.label,
    'model_digest': cascade.digest,
    'weak_digest': cascade.weak_digest,
    'negative_prompt': run.negative_prompt,
    'stages': {
      stage.name: {key: values[i] for key, values in run.sampling.items()}
      for i, stage in enumerate(cascade.stages)
    },
    'seed': run.seed,
    'dtype': cascade.dtype.name,
    'prompts': run.suite.digest(),
  }


def _provenance(
  config: EvalConfig, run: generation.Run, cascade: Cascade
) -> dict[str, typing.Any]:
  """The rest of what the scores were measured on."""
  return {
    'run': run.folder.relative_to(config.out).as_posix(),
    'model': os.fspath(config.model) if config.model else 'demo',
    'resolution': cascade.stages[-1].resolution,
    'batch_size': run.batch_size,
    'device': f'{jax.local_device_count()} {jax.devices()[0].device_kind}',
    'version': imagen_jax.__version__,
    'date': time.strftime('%Y-%m-%d'),
    **run.suite.provenance(),
  }


def _score(
  config: EvalConfig, run: generation.Run, provenance: dict[str, typing.Any]
) -> Categories:
  """Scores a finished run and saves what the report needs."""
  records = generation.read_records(run.folder)
  result = run.suite.score(run.folder, records)
  report.save_section(run.suite, run.folder, records)
  for entry, categories in result.items():
    label = run.labelled(entry)
    scores.add_scores(config.out, label, categories, provenance)
  return result[run.suite.label]
