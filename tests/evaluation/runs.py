"""Evaluation runs of a suite without a model."""

import numpy as np

from imagen_jax.cascade.cascade import Cascade
from imagen_jax.evaluation import generation, report, scores


class Painter(Cascade):
  """A fake cascade whose images are a function of the item."""

  def __init__(self, items, paint):
    self.items = {(item.prompt, item.index): item for item in items}
    self.paint = paint

  def sample(self, prompts, *, indices, finished, **_):
    chosen = [self.items[p, i] for p in prompts for i in indices]
    finished(0, np.stack([self.paint(item) for item in chosen]))


def finish(out, suite, paint, point=''):
  """Samples and scores a run; returns the suite's scores."""
  folder = out / suite.label / (point or 'run')
  generation.open_run(folder, {'prompts': suite.digest()})
  run = generation.Run(suite, folder)
  generation.generate(Painter(suite.items(), paint), run)
  records = generation.read_records(folder)
  found = suite.score(folder, records)
  report.save_section(suite, folder, records)
  note = {
    'suite': suite.label,
    'run': str(folder.relative_to(out)),
    'model': '<my model>',
    'model_digest': '0',
    'date': '2022-05-23',
    'stages': {'base': {'steps': 1}},
    **suite.provenance(),
  }
  for key, value in found.items():
    scores.add_scores(out, key + (point and f'@{point}'), value, note)
  return found
