"""Rematerialisation: what the backward pass computes a second time."""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax

from imagen_jax.nets.dense import SAVED

Module = TypeVar('Module', bound=type[nn.Module])

# From the least memory to the fewest FLOPs. `convs_saveable` saves what
# convolutions, dense layers and the sums of norms give. Computed again are
# activations, scale and shift, which take hardly any FLOPs, and an attention's
# weights, which are large. jax's `dots_saveable` saves convolutions and these
# weights.
POLICIES: dict[str, Callable[..., Any]] = {
  'nothing_saveable': jax.checkpoint_policies.nothing_saveable,
  'convs_saveable': jax.checkpoint_policies.save_only_these_names(SAVED),
  'dots_saveable': jax.checkpoint_policies.dots_saveable,
}


def remat(
  module: Module, policy: str | None, static: tuple[int, ...] = ()
) -> Module:
  """Rematerialises a module in the backward pass; None: leaves it as it is.

  Args:
    module: a Linen class.
    policy: a name in `POLICIES`.
    static: indices of the arguments of `__call__` that are Python values;
      index 0 is the module itself.
  """
  if policy is None:
    return module
  return nn.remat(module, policy=POLICIES[policy], static_argnums=static)
