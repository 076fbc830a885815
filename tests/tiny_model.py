"""A cascade of a few thousand random parameters, for tests."""

import dataclasses

import jax
import numpy as np
from imagen_jax.configs import common

from imagen_jax.cascade import stage, stage_config
from imagen_jax.io import model_folder
from imagen_jax.text.encoder import load_text_encoder
from tests import tiny_text

MAX_LEN = 12

# Of `config().stage.net`, where a test is about the U-Net.
UNET = {
  'kind': 'unet',
  'channels': 8,
  'channel_mults': (1, 2),
  'num_res_blocks': 1,
  'attention_resolutions': (4,),
  'head_dim': 8,
  'norm_groups': 4,
}


def config(name='base', **train):
  """The config of stage 'base' (8 pixels) or 'sr1' (8→16, Efficient U-Net)."""
  config = common.stage_run()
  config.dtype = 'float32'
  config.mesh.data = 2  # more devices would only take longer to compile
  config.stage.update(name=name, resolution=8, prediction='v')
  config.stage.net = {'kind': 'tests.tiny_net:TinyNet'}
  config.stage.sampling.update(sampler='dpmpp', steps=3, guidance=2.0)
  if name == 'sr1':
    config.stage.update(resolution=16, low_resolution=8)
    config.stage.net = {
      'kind': 'efficient_unet',
      'channels': (8, 8),
      'num_res_blocks': (1, 2),
      'strides': (2, 2),
      'self_attention': (False, False),
      'text_attention': (False, True),
      'num_heads': 2,
      'emb_channels': 16,
      'norm_groups': 4,
    }
    config.stage.sampling.update(sampler='ddim', steps=2, guidance=1.0)
    config.stage.sampling.aug_level = 0.1
  config.text.update(path='', max_len=MAX_LEN)
  config.data.kind = 'shapes'
  config.train.update(num_steps=6, batch_size=8, ema_decay=0.99)
  config.train.update(log_every=1, checkpoint_every=3, sample_every=None)
  config.train.update(eval_every=None, max_bad_steps=2)
  config.train.optimizer.update(learning_rate=1e-3, warmup=2, decay=False)
  config.train.update(train)
  return config


def random_params(made, seed=0):
  """Random NumPy parameters of a `Stage`; zero-initialised ones too."""
  shapes = jax.eval_shape(
    lambda key: stage.init_params(made, key), jax.random.key(0)
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: 0.15 * rng.normal(size=s.shape).astype(np.float32), shapes
  )


def with_network(made, net):
  """A `Stage` with a fake network, which need not be a `Network`."""
  made = dataclasses.replace(made)
  object.__setattr__(made, 'net', net)
  return made


def build(made_config, encoder):
  """The `Stage` of a config."""
  return stage_config.from_config(
    made_config.stage.to_dict(), text_dim=encoder.dim, text_len=MAX_LEN
  )


def write(folder, kind='t5'):
  """Writes a model folder with stages base and sr1, of a T5 unless it has one.

  Args:
    folder: with the encoder in `text`, for another kind than T5.
    kind: of the encoder.
  """
  if kind == 't5':
    tiny_text.random_folder(folder / 'text')
  for i, name in enumerate(['base', 'sr1']):
    _write_stage(folder, config(name), folder / 'text', i)
  return folder


def write_weak(folder, model):
  """Writes a folder with a smaller network of `model`'s stage base."""
  made = config()
  made.stage.net.channels = 4
  _write_stage(folder, made, model / 'text', 2)
  return folder


def _write_stage(folder, made, text, seed):
  encoder = load_text_encoder(text)
  made.text.path = str(text)
  model_folder.save_stage(
    folder / made.stage.name,
    random_params(build(made, encoder), seed),
    config=made.to_dict(),
    text={
      'kind': encoder.kind,
      'dim': encoder.dim,
      'max_len': MAX_LEN,
      'digest': encoder.digest,
    },
    provenance={},
    dtype='float32',
  )
