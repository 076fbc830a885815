"""Captions through T5-XXL's encoder, padded to each bucket's length."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from accelerator_work import call_times, median, random_tree, utilization

from imagen_jax.nets import t5
from imagen_jax.text import weights
from imagen_jax.text.encoder import encode_tokens
from imagen_jax.training.flops import count_flops

TINY = {'width': 16, 'num_layers': 2, 'num_heads': 2, 'mlp_dim': 32}


@functools.cache
def _params(module: t5.T5Encoder) -> Any:
  """Random weights, which the rows of a process share."""
  return random_tree(weights.abstract_params(module))


class Work:
  """One batch of captions, every position of which is a token."""

  def __init__(self, given: Mapping[str, Any], rehearse: bool) -> None:
    self._rehearse, self._batch = rehearse, given['batch']
    sizes = TINY if rehearse else t5.SIZES['xxl']
    self._module = t5.T5Encoder(**sizes, dtype=jnp.bfloat16)
    shape = self._batch, given['length']
    self._ids = jnp.full(shape, 3, jnp.int32)
    self._mask = jnp.ones(shape, bool)

  def compile(self) -> None:
    shapes = weights.abstract_params(self._module)
    traced = encode_tokens.trace(self._module, shapes, self._ids, self._mask)
    self._flops = count_flops(traced.jaxpr)
    self._run = traced.lower().compile()

  def measure(self) -> dict[str, Any]:
    params = _params(self._module)
    run = lambda: self._run(params, self._ids, self._mask)
    seconds = call_times(run, self._rehearse)
    return {
      'batch': self._batch,
      'seconds': median(seconds),
      'times': seconds,
      'mfu': utilization(self._flops, median(seconds)),
    }
