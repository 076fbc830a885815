r"""Judges base models with different text encoders, at 64 pixels.

  python benchmarks/judged_base.py --num 32 runs/a runs/b

Every workdir's base model samples the prompts of the shapes suite with its own
text encoder. The demo's first super-resolution stage, with the demo's encoder,
upsamples the images, so only the base models differ. Prints the fraction that
the judge finds correct, with Wilson's 95 % interval, and each workdir's last
held-out loss; then the fraction correct per aspect, over all images whose
prompt states it. If the number of things is wrong, relations count as wrong
and shapes and colours almost always do.
"""

import argparse
import collections
import json
import pathlib

import imagen_jax
from imagen_jax import sharding
from imagen_jax.evaluation import scores
from imagen_jax.worlds.judge import judge
from imagen_jax.worlds.suite import ShapesSuite, scene

CATEGORIES = ('single', 'pair', 'relation', 'count')
ASPECTS = ('count', 'shape', 'colour', 'relation', 'background')
BATCH = 16
KEY = 'heldout_loss_ema'


def heldout_loss(workdir):
  """The last held-out loss of a run, as text; a dash if there is none."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  found = [row[KEY] for row in rows if KEY in row]
  return f'{found[-1]:.4f}' if found else '–'


def verdicts(base, upsampler, items):
  """The judge's verdict on each item's image."""
  for start in range(0, len(items), BATCH):
    part = items[start : start + BATCH]
    prompts = [item.prompt for item in part]
    small = base.sample(prompts, batch_size=BATCH)['base']
    large = upsampler.sample(prompts, low_res=small, batch_size=BATCH)['sr1']
    for item, image in zip(part, large):
      meaning = scene(item.category, item.number).meaning
      yield judge(image, meaning)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdirs', nargs='+', type=pathlib.Path)
  parser.add_argument('--num', type=int, default=32)
  args = parser.parse_args()
  sharding.set_cpu_devices()
  upsampler = imagen_jax.load(stages=['sr1'])
  print('| base | held-out loss |', ' | '.join(CATEGORIES), '|')
  print('|---|---|' + '---|' * len(CATEGORIES))
  aspects = {}
  for workdir in args.workdirs:
    base = imagen_jax.load(workdir, stages=['base'])
    cells, found = [], collections.defaultdict(list)
    for category in CATEGORIES:
      items = ShapesSuite((category,), args.num).items()
      seen = list(verdicts(base, upsampler, items))
      cells.append(scores.cell(verdict.correct for verdict in seen))
      for verdict in seen:
        for aspect, holds in verdict.aspects.items():
          if holds is not None:
            found[aspect].append(holds)
    aspects[workdir] = [scores.cell(found[aspect]) for aspect in ASPECTS]
    print(
      f'| {workdir} | {heldout_loss(workdir)} |',
      ' | '.join(cells),
      '|',
      flush=True,
    )
  print('\n| base |', ' | '.join(ASPECTS), '|')
  print('|---|' + '---|' * len(ASPECTS))
  for workdir, cells in aspects.items():
    print(f'| {workdir} |', ' | '.join(cells), '|')


if __name__ == '__main__':
  main()
