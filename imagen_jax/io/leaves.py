"""The leaves of a state, as a checkpoint's manifest describes them.

{'params/down_0/kernel': 'float32[3,3,8,8]'}
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from imagen_jax.errors import ModelError


def describe(tree: Any) -> dict[str, str]:
  """{path: dtype and shape} of every leaf of a tree of arrays or numbers."""

  def kind(x: Any) -> str:
    return f'{_dtype(x)}[{",".join(map(str, np.shape(x)))}]'

  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): kind(x)
    for path, x in leaves
  }


def subtree(leaves: Mapping[str, str], name: str) -> dict[str, Any]:
  """{name: nested dicts of `jax.ShapeDtypeStruct`}, or {} if there is none."""

  def struct(kind: str) -> jax.ShapeDtypeStruct:
    dtype, shape = kind.removesuffix(']').split('[')
    sides = [int(n) for n in shape.split(',') if n]
    return jax.ShapeDtypeStruct(sides, jnp.dtype(dtype))

  wanted = {
    path: struct(kind)
    for path, kind in leaves.items()
    if path.split('/')[0] == name
  }
  return traverse_util.unflatten_dict(wanted, sep='/')


def check(
  path: Any, saved: Mapping[str, str], wanted: Mapping[str, str], advice: str
) -> None:
  """Checks that a saved state has the wanted leaves.

  Args:
    path: of the state, for the message.
    saved, wanted: see `describe`.
    advice: what to do about another model's state, for the message.

  Raises:
    ModelError: naming the first leaf that differs.
  """
  for name in sorted(saved.keys() | wanted.keys()):
    there, here = saved.get(name), wanted.get(name)
    if there != here:
      raise ModelError(
        f'{path} was saved by another model: {name} is {there or "absent"} '
        f'there and {here or "absent"} here; {advice}.'
      )


def arrays(tree: Any) -> Any:
  """Converts numbers to arrays of the dtype that jax gives them."""
  return jax.tree.map(
    lambda x: x if isinstance(x, jax.Array) else np.asarray(x, _dtype(x)), tree
  )


def _dtype(x: Any) -> Any:
  return getattr(x, 'dtype', None) or jax.dtypes.result_type(x)
