"""imagen-check-t5-xxl: compares this port of T5 with a published reference.

The reference is T5-XXL's output for the empty prompt in the public DeepFloyd IF
repository, `deepfloyd_if/resources/zero_t5-v1_1-xxl_vector.npy`. The check
needs the T5-XXL weights.
"""

import sys
from collections.abc import Sequence

from imagen_jax.cli import errors, runtime
from imagen_jax.io.paths import user_path

LEAST_COSINE = 0.99


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit code."""
  return errors.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
  parser = errors.Parser(
    prog='imagen-check-t5-xxl',
    description="Compare T5's output for the empty prompt with a reference.",
  )
  parser.add_argument(
    '--model',
    type=user_path,
    required=True,
    help='folder with text_encoder/ and tokenizer/, such as IF-I-XL-v1.0',
  )
  parser.add_argument(
    '--reference',
    type=user_path,
    required=True,
    help='.npy of 77 × 4096 numbers',
  )
  parser.add_argument(
    '--dtype', default='bfloat16', choices=['bfloat16', 'float32']
  )
  args = parser.parse_args(argv)
  runtime.start()

  from imagen_jax.deepfloyd.text import check_reference
  from imagen_jax.errors import ModelError

  result = check_reference(args.model, args.reference, args.dtype)
  print(
    f'least cosine similarity of a position {result["cosine"]:.5f}, relative '
    f'error {result["error"]:.2%}'
  )
  if result['cosine'] < LEAST_COSINE:
    raise ModelError(
      f'{args.model} does not give {args.reference}: the least cosine '
      f'similarity of a position is {result["cosine"]:.3f}; download '
      't5-v1_1-xxl again.'
    )
  return 0


if __name__ == '__main__':
  sys.exit(main())
