"""One stage of the cascade: a network, its schedule, what it is fed.

A stage is a conditional diffusion model p(x | text) or, for the
super-resolution stages, p(x | low-resolution picture, text) (Section 2).
Everything is a pure function of (stage, params, …).
"""

from imagen_jax.stage.conditioning import (
  box_downsample,
  enlarge,
  low_res_input,
  null_where,
  to_uint8,
)
from imagen_jax.stage.definition import (
  Sampling,
  Stage,
  from_config,
  init_params,
  multiple,
  num_params,
  param_shapes,
)
from imagen_jax.stage.draw import check_sampling, network, sample
from imagen_jax.stage.objective import loss

__all__ = [
  'Sampling',
  'Stage',
  'box_downsample',
  'check_sampling',
  'enlarge',
  'from_config',
  'init_params',
  'loss',
  'low_res_input',
  'multiple',
  'network',
  'null_where',
  'num_params',
  'param_shapes',
  'sample',
  'to_uint8',
]
