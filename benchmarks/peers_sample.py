"""Sampling with guidance, by the ancestral sampler (DDPM)."""

import numpy as np
import peers_nets as nets

IMAGES, GUIDANCE = 4, 3.0


def _ours(side, steps, low=None):
  import jax

  from imagen_jax import sharding
  from imagen_jax.cascade import sampling, stage
  from imagen_jax.diffusion.samplers import SamplerSpec

  made = nets.stage(nets.config(side, low))
  params = jax.jit(lambda key: stage.init_params(made, key))(jax.random.key(0))
  mesh = sharding.sampling_mesh(0)
  spec = SamplerSpec(sampler='ddpm', steps=steps)
  rows = sharding.batch_sharding(mesh)
  run = sampling.program(made, spec, rows, None)
  inputs = sampling.SampleInputs(
    keys=jax.random.key_data(jax.random.split(jax.random.key(0), IMAGES)),
    text=nets.numbers(IMAGES, nets.TEXT, nets.WIDTH),
    mask=np.ones((IMAGES, nets.TEXT), bool),
    low_res=nets.numbers(IMAGES, low, low, 3).clip(-1, 1) if low else None,
    guidance=np.float32(GUIDANCE),
    aug_level=np.float32(0.2),
  )

  state = sampling.no_state(made, spec, inputs)
  state = sharding.put_whole_batch(state, mesh)

  def work():
    nonlocal state
    with jax.set_mesh(mesh):
      state = run(params, inputs, np.int32(0), np.int32(steps), state)
    state.x.block_until_ready()

  return work


def _imagen_pytorch(side, steps, low=None):
  import torch

  made, number = nets.torch_imagen(side, low, steps)
  given = {
    'text_embeds': torch.from_numpy(
      nets.numbers(IMAGES, nets.TEXT, nets.WIDTH)
    ),
    'text_masks': torch.ones(IMAGES, nets.TEXT, dtype=torch.bool),
    'cond_scale': GUIDANCE,
    'use_tqdm': False,
  }
  if low:
    small = torch.rand(IMAGES, 3, low, low)
    given.update(start_at_unet_number=number, start_image_or_video=small)
  return lambda: made.sample(**given)


contenders = {'imagen_jax': _ours, 'imagen-pytorch': _imagen_pytorch}
