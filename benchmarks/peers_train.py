"""A training step: loss, gradient, Adam, EMA, with embedded captions."""

import numpy as np
import peers_nets as nets


def _ours(side, batch, low=None):
  import jax

  from imagen_jax import sharding
  from imagen_jax.cascade import objective, stage
  from imagen_jax.training import cpu_layout
  from imagen_jax.training.optimizer import make_optimizer
  from imagen_jax.training.state import init_state
  from imagen_jax.training.step import make_train_step

  config = nets.config(side, low)
  config.train.batch_size = batch
  print(cpu_layout.settle(config, None) or 'the layout was not measured')
  made, tx = nets.stage(config), make_optimizer(config.train)

  def loss(params, key, batch, frozen):
    arrays = batch['image'], batch['text'], batch['mask']
    return objective.loss(made, params, key, *arrays)

  mesh = sharding.make_mesh(config.mesh.data)
  whole = sharding.replicated(mesh)
  params = jax.jit(lambda key: stage.init_params(made, key))(jax.random.key(0))
  state = jax.jit(lambda p: init_state(p, tx), out_shardings=whole)(params)
  step = jax.jit(
    make_train_step(loss, tx, seed=0, ema_limit=0.9999),
    donate_argnums=0,
    compiler_options=cpu_layout.compiler_options(config, mesh),
  )
  image = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3))
  rows = {
    'image': image.astype(np.uint8),
    'text': nets.numbers(batch, nets.TEXT, nets.WIDTH),
    'mask': np.ones((batch, nets.TEXT), bool),
  }

  def work():
    nonlocal state
    with jax.set_mesh(mesh):
      state, metrics = step(state, sharding.put_batch(rows, mesh), {})
    jax.block_until_ready((state, metrics))

  return work


def _imagen_pytorch(side, batch, low=None):
  import torch

  made, number = nets.torch_imagen(side, low)
  trainer = nets.imagen_pytorch().ImagenTrainer(
    made, use_ema=True, only_train_unet_number=number
  )
  given = {
    'text_embeds': torch.from_numpy(nets.numbers(batch, nets.TEXT, nets.WIDTH)),
    'text_masks': torch.ones(batch, nets.TEXT, dtype=torch.bool),
    'unet_number': number,
  }
  image = torch.rand(batch, 3, side, side)

  def work():
    trainer(image, max_batch_size=batch, **given)
    trainer.update(unet_number=number)

  return work


contenders = {'imagen_jax': _ours, 'imagen-pytorch': _imagen_pytorch}
