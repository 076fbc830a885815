"""How far few steps of a deterministic sampler end from many, on the demo.

All deterministic samplers follow the same ODE from the same noise, so the
distance to the image of many steps is the error of the solver. The judge of
`evaluate.py` hardly sees it.

  python benchmarks/sampler_error.py --steps 5,8,12,16,32
"""

import argparse

import numpy as np

import imagen_jax

SAMPLERS = ('ddim', 'dpmpp', 'unipc')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', default='5,8,12,16,32')
  parser.add_argument('--prompts', default='docs/demo.txt')
  parser.add_argument('--num_images', type=int, default=3)
  parser.add_argument('--converged', type=int, default=256, help='steps')
  parser.add_argument('--threshold', default='dynamic')
  args = parser.parse_args()
  with open(args.prompts, encoding='utf-8') as file:
    prompts = [line.strip() for line in file if line.strip()]
  cascade = imagen_jax.load(dtype='float32', stages=['base'])
  embedding = cascade.embed(prompts)

  def sample(sampler: str, steps: int) -> np.ndarray:
    images = cascade.sample(
      embedding,
      num_images=args.num_images,
      batch_size=args.num_images * len(prompts),
      sampler=sampler,
      steps=steps,
      threshold=args.threshold,
    )
    return images['base'].astype(float)

  def error(images: np.ndarray) -> float:
    # The median: a few steps may end at another image altogether.
    squares = np.mean((images - exact) ** 2, axis=(1, 2, 3))
    return float(np.median(np.sqrt(squares)))

  exact = sample('dpmpp', args.converged)
  steps = [int(n) for n in args.steps.split(',')]
  print('| median RMS, grey levels | ' + ' | '.join(map(str, steps)) + ' |')
  print('|---' * (len(steps) + 1) + '|')
  for sampler in SAMPLERS:
    errors = [error(sample(sampler, n)) for n in steps]
    print(f'| {sampler} | ' + ' | '.join(f'{e:.1f}' for e in errors) + ' |')


if __name__ == '__main__':
  main()
