"""Training on prepared data with stored embeddings; low-resolution inputs."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from imagen_jax.cascade import cascade, conditioning, objective, sampling
from imagen_jax.cli import embed
from imagen_jax.diffusion import samplers
from imagen_jax.errors import DataError, ModelError
from imagen_jax.io import embeddings, model_folder
from imagen_jax.nets.network import Network
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.training import loop, stage_experiment
from imagen_jax.training.experiment import make_experiment
from imagen_jax.training.input import split_index, train_batches
from imagen_jax.training.optimizer import optimizer
from imagen_jax.training.stage_experiment import StageExperiment
from imagen_jax.training.state import init_state
from imagen_jax.training.step import make_train_step
from tests import prepared as set_of
from tests import tiny_model, tiny_text


@pytest.fixture(scope='module')
def prepared(model, tmp_path_factory):
  """A config of the tiny base model on prepared shapes with embeddings."""
  out = tmp_path_factory.mktemp('prepared') / 'set'
  set_of.prepare(out, kind='shapes', number=16, size=8)
  words = ['--path', str(out), '--text', str(model / 'text')]
  assert embed.main([*words, '--max_len', str(tiny_model.MAX_LEN)]) == 0
  config = tiny_model.config(num_steps=2, sample_every=None)
  config.text.path = str(model / 'text')
  config.data.update(kind='arrayrecord', path=str(out))
  return config


def test_stored_embeddings_take_the_place_of_the_encoder(prepared):
  made = make_experiment(prepared)
  batch, _ = split_index(next(train_batches(made, 0)))
  assert {name: array.dtype for name, array in batch.items()} == {
    'image': np.uint8,
    'text': ml_dtypes.bfloat16,
    'mask': np.bool_,
  }
  spec = made.batch_spec(prepared.train.batch_size)
  assert jax.tree.map(jax.typeof, batch) == jax.tree.map(jax.typeof, spec)
  assert made.frozen_spec() == made.load_frozen() == {}


def test_stored_embeddings_need_no_encoder_on_this_machine(
  prepared, model, tmp_path, monkeypatch
):
  """Neither the step, nor the held-out loss, nor the previews."""
  config = prepared.copy_and_resolve_references()
  config.text.path = str(tmp_path / 'not here')
  config.data.eval_path = config.data.path
  config.train.update(sample_every=2, eval_every=2)
  monkeypatch.delattr(stage_experiment, 'load_text_encoder')
  assert loop.train(config, tmp_path / 'run') == 2
  assert list((tmp_path / 'run' / 'samples').iterdir())
  encoder = load_text_encoder(model / 'text')
  record = model_folder.load_stage(tmp_path / 'run')
  assert record.text == {
    'kind': 't5',
    'dim': encoder.dim,
    'max_len': tiny_model.MAX_LEN,
    'digest': encoder.digest,
    'store': 'bfloat16',
  }
  with pytest.raises(ValueError):
    make_experiment(config).text.encode(['a red circle'])


def test_a_run_that_leaves_the_embeddings_alone_loads_the_encoder(prepared):
  config = prepared.copy_and_resolve_references()
  config.data.text = None
  made = make_experiment(config)
  assert not made.cached_text and made.text.dim == made.text_dim
  assert 'ids' in next(train_batches(made, 0))


def test_both_splits_have_embeddings_or_the_run_is_refused(prepared, tmp_path):
  config = prepared.copy_and_resolve_references()
  set_of.prepare(tmp_path / 'held', kind='shapes', number=8, size=8)
  config.data.eval_path = str(tmp_path / 'held')
  with pytest.raises(DataError, match='eval_path'):
    make_experiment(config)


def test_a_cascade_embeds_its_prompts_in_the_precision_of_training(
  model, tmp_path
):
  folder = shutil.copytree(model, tmp_path / 'model')
  encoder = load_text_encoder(folder / 'text')
  half = load_text_encoder(folder / 'text', 'bfloat16')
  prompts = ['a red circle', 'two blue stars above a square']
  exact, mask = encoder.encode(prompts, max_len=tiny_model.MAX_LEN)
  rough, _ = half.encode(prompts, max_len=tiny_model.MAX_LEN)
  assert np.abs(exact - rough).max() > 1e-3
  file = folder / 'base' / 'stage.json'
  stage = json.loads(file.read_text())
  for dtype, store, expected in (
    ('float32', None, exact),
    ('bfloat16', None, rough),
    ('float32', 'bfloat16', embeddings.rounded(exact, 'bfloat16')),
    ('bfloat16', 'int8', embeddings.rounded(rough, 'int8')),
  ):
    stage['config']['text']['dtype'] = dtype
    stage['text'] |= {'store': store}
    file.write_text(json.dumps(stage))
    for activations in ('float32', 'bfloat16'):
      made = cascade.load(folder, dtype=activations).embed(prompts)
      np.testing.assert_array_equal(made.text, expected)
  stage['text']['store'] = 'int4'
  file.write_text(json.dumps(stage))
  with pytest.raises(ModelError):
    cascade.load(folder)


@pytest.mark.parametrize('key', ['max_len', 'dtype', 'kind', 'encoder'])
def test_embeddings_of_another_encoder_are_refused(prepared, tmp_path, key):
  config = prepared.copy_and_resolve_references()
  if key in ('max_len', 'dtype', 'kind'):
    config.text[key] = {'max_len': 9, 'dtype': 'bfloat16', 'kind': 'bert'}[key]
    if key == 'kind':  # an encoder that is there would be of another kind
      config.text.path = str(tmp_path / 'not here')
  else:
    tiny_text.random_folder(tmp_path / 'text', seed=5)
    config.text.path = str(tmp_path / 'text')
  with pytest.raises(DataError) as error:
    loop.train(config, tmp_path / 'run')
  assert key in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_step_is_the_same_with_tokens_and_with_their_embeddings(model):
  def loss(params, key, batch, frozen):  # a network would take minutes
    seen = jnp.where(batch['mask'][..., None], batch['text'] ** 2, 0)
    return params['w'] * seen.mean((1, 2)), {}

  encoder = load_text_encoder(model / 'text')
  tx = optimizer(1e-2)
  state = init_state({'w': jnp.ones(())}, tx)
  made = StageExperiment(tiny_model.config(), text=encoder)
  fn = make_train_step(
    loss, tx, seed=0, ema_limit=0.9, condition=made.condition
  )
  captions = ['a red circle', 'a blue square'] * 2
  ids, mask, _ = encoder.tokenize(captions, max_len=tiny_model.MAX_LEN)
  text, _ = encoder.encode(captions, max_len=tiny_model.MAX_LEN)
  image = np.zeros((4, 8, 8, 3), np.uint8)
  _, online = fn(
    state, {'image': image, 'ids': ids, 'mask': mask}, encoder.params
  )
  assert float(online['grad_norm']) > 0
  for dtype, rtol in ((np.float32, 1e-5), (ml_dtypes.bfloat16, 1e-2)):
    batch = {'image': image, 'text': text.astype(dtype), 'mask': mask}
    _, stored = fn(state, batch, {})
    for name in ('loss', 'grad_norm'):
      np.testing.assert_allclose(online[name], stored[name], rtol=rtol)


def test_training_and_sampling_make_the_low_resolution_input_alike(
  model, monkeypatch
):
  """With equal noise and level, the network gets the same tensor in both."""
  encoder = load_text_encoder(model / 'text')
  made = tiny_model.build(tiny_model.config('sr1'), encoder)
  given = {}

  class Spy(Network):
    where: str

    def __call__(self, z, logsnr, text, mask, low, level, train=False):
      given[self.where] = low, level
      return jnp.zeros_like(z)

  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
  x = jnp.asarray(image, jnp.float32) / 127.5 - 1
  low = conditioning.box_downsample(x, 8)
  # Sampling generates noise per image, so both images get the same noise.
  one = rng.normal(size=low.shape[1:])
  eps = jnp.asarray(np.stack([one, one]), jnp.float32)
  normal = jax.random.normal
  monkeypatch.setattr(
    jax.random,
    'normal',
    lambda key, shape=(), dtype=jnp.float32: (
      eps
      if shape == eps.shape
      else eps[0]
      if shape == eps.shape[1:]
      else normal(key, shape, dtype)
    ),
  )
  monkeypatch.setattr(
    jax.random, 'uniform', lambda key, shape=(), *_: jnp.full(shape, 0.2)
  )
  text = jnp.zeros((2, tiny_model.MAX_LEN, encoder.dim))
  mask = jnp.ones(text.shape[:2], bool)
  replace = functools.partial(tiny_model.with_network, made)
  objective.loss(
    replace(Spy('training')), {}, jax.random.key(0), image, text, mask
  )
  sampling.sample(
    replace(Spy('sampling')),
    {},
    samplers.SamplerSpec(sampler='ddim', steps=1),
    sampling.SampleInputs(
      keys=jax.random.split(jax.random.key(1), 2),
      text=text,
      mask=mask,
      low_res=low,
      aug_level=0.2,
    ),
  )
  for mine, theirs in zip(given['training'], given['sampling']):
    np.testing.assert_allclose(mine, theirs, atol=1e-6)
  assert given['training'][0].shape == (2, 16, 16, 3)
  assert float(jnp.abs(given['training'][0]).max()) > 0.5
