r"""What bfloat16 gains on this processor, beside float32.

  python benchmarks/bfloat16.py

Prints GFLOP/s of a matrix product and of a convolution of the sizes that the
networks have. A processor with AMX multiplies bfloat16 several times as fast as
float32, and XLA uses it where the result of a matrix product is float32.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp


def gflops(function, work: float, *args: jax.Array, turns: int) -> float:
  """The median rate of `turns` calls, in 1e9 operations a second."""
  compiled = jax.jit(function)
  jax.block_until_ready(compiled(*args))
  seconds = []
  for _ in range(turns):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    seconds.append(time.perf_counter() - start)
  return work / statistics.median(seconds) / 1e9


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--turns', type=int, default=20)
  turns = parser.parse_args().turns
  key, wide = jax.random.key(0), jnp.float32
  kinds = (
    ('float32', wide, wide),
    ('bfloat16', jnp.bfloat16, None),
    ('bfloat16, to float32', jnp.bfloat16, wide),
  )
  print('| | matrix product | 3×3 convolution |\n|---|---|---|')
  for name, dtype, result in kinds:
    a = jax.random.normal(key, (2048, 1024), dtype)
    b = jax.random.normal(key, (1024, 1024), dtype)
    x = jax.random.normal(key, (32, 16, 16, 144), dtype)
    w = jax.random.normal(key, (3, 3, 144, 144), dtype)
    product = functools.partial(jnp.dot, preferred_element_type=result)
    convolution = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=(1, 1),
      padding='SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      preferred_element_type=result,
    )
    rates = (
      gflops(product, 2 * a.size * b.shape[1], a, b, turns=turns),
      gflops(convolution, 2 * x[..., 0].size * w.size, x, w, turns=turns),
    )
    print(f'| {name} |', ' | '.join(f'{rate:,.0f}' for rate in rates), '|')


if __name__ == '__main__':
  main()
