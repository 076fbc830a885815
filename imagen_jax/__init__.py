"""Imagen (Saharia et al. 2022) in JAX and Flax: text in, images out.

import imagen_jax
cascade = imagen_jax.load()  # the bundled demo model
images = cascade.sample(['a red circle above a blue square'])['sr2']
"""

from typing import Any

__version__ = '0.1.0'
__all__ = ['load', 'Cascade', 'ImagenError']


def __getattr__(name: str) -> Any:
  # jax is imported when it is needed: `import imagen_jax` and --help are fast.
  if name in ('load', 'Cascade'):
    from imagen_jax.cascade import cascade

    return getattr(cascade, name)
  if name == 'ImagenError':
    from imagen_jax.errors import ImagenError

    return ImagenError
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
