"""DeepFloyd IF from a folder to images, from Python and with sample.py."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli import sample
from imagen_jax.deepfloyd import (
  check_t5_xxl,
  cleaning,
  images,
  pipeline,
  schedule,
  settings,
  stage,
  text,
)
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import images as image_io
from imagen_jax.text import weights as text_weights
from tests import tiny_if, tiny_model

STEPS = {'steps': 4, 'guidance': 3.0}
FIRST, SECOND = 'IF-I-S-v1.0', 'IF-II-S-v1.0'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_if.write(tmp_path_factory.mktemp('IF'))


@pytest.fixture(scope='module')
def model(folder):
  return pipeline.load(folder, dtype='float32')


@pytest.fixture(scope='module')
def first(folder):
  return pipeline.load(folder, dtype='float32', stages=[FIRST])


@pytest.fixture(scope='module')
def generated(model):
  """The images of one call with two prompts, two images each."""
  return model.sample(['a red circle', 'a star'], num_images=2, seed=5, **STEPS)


def photo(width=16, height=8):
  rng = np.random.default_rng(0)
  return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def test_stages_follow_one_another(model, generated):
  assert [s.name for s in model.stages] == [FIRST, SECOND]
  assert {k: v.shape for k, v in generated.items()} == {
    FIRST: (4, 8, 8, 3),
    SECOND: (4, 32, 32, 3),
  }
  for value in generated.values():
    assert np.isfinite(value).all() and np.abs(value).max() <= 1


def test_an_image_does_not_depend_on_its_batch(model, generated):
  alone = model.sample('a star', num_images=2, seed=5, batch_size=4, **STEPS)
  for name, value in alone.items():
    np.testing.assert_allclose(value, generated[name][2:], atol=1e-4)
  assert np.abs(generated[FIRST][0] - generated[FIRST][1]).max() > 0.1
  assert np.abs(generated[FIRST][0] - generated[FIRST][2]).max() > 0.1


def test_one_program_for_all_samplers_levels_and_weights(first):
  one = dict(num_images=1, batch_size=4, seed=1)
  first.sample('a star', **STEPS, **one)
  before = stage.jitted()._cache_size()
  for sampler in ('ddim', 'dpmpp'):
    first.sample('a star', sampler=sampler, steps=4, guidance=5.0, **one)
  first.sample('a star', steps=4, guidance=7.0, aug_level=0.1, **one)
  assert stage.jitted()._cache_size() == before


@pytest.mark.slow
def test_a_network_split_over_devices_generates_the_same(folder, first):
  spread = pipeline.load(folder, dtype='float32', stages=[FIRST], fsdp=4)
  asked = dict(seed=5, steps=3, guidance=3.0)
  one = first.sample(['a red circle', 'a star'], **asked)[FIRST]
  several = spread.sample(['a red circle', 'a star'], **asked)[FIRST]
  np.testing.assert_allclose(several, one, atol=1e-3)


@pytest.mark.slow
def test_inpainting_keeps_the_rest_to_the_bit(model):
  given = photo()
  mask = np.zeros((8, 16), np.uint8)
  mask[2:6, 4:12] = 255
  out = model.sample('a star', image=given, mask=Image.fromarray(mask), steps=4)
  kept = mask == 0
  np.testing.assert_array_equal(
    out[FIRST][0][kept], image_io.to_float(given, *given.size)[kept]
  )
  assert (
    np.abs(out[FIRST][0] - image_io.to_float(given, *given.size))[~kept].min()
    > 1e-5
  )
  assert out[SECOND].shape == (1, 32, 64, 3)
  large = image_io.to_mask(Image.fromarray(mask), 64, 32)[..., 0] == 0
  np.testing.assert_array_equal(
    out[SECOND][0][large], image_io.to_float(given, 64, 32)[large]
  )


def test_a_start_from_an_image_stays_near_it(first):
  given = photo(8, 8)
  # Four steps each, so that one program serves both.
  far = first.sample('a star', image=given, steps=4, strength=1.0)[FIRST]
  near = first.sample('a star', image=given, steps=16, strength=0.25)[FIRST]
  distance = lambda x: np.abs(x - image_io.to_float(given, *given.size)).mean()
  assert distance(near) < distance(far)


@pytest.mark.slow
def test_a_second_stage_upsamples_ones_own_image(folder):
  model = pipeline.load(folder, dtype='float32', stages=[SECOND])
  out = model.sample('a star', low_res=photo(), steps=2, aug_level=0.1)
  assert out[SECOND].shape == (1, 32, 64, 3)
  with pytest.raises(UsageError):
    model.sample('a star')


@pytest.mark.slow
def test_a_style_changes_the_image(first):
  plain = first.sample('a star', steps=2)[FIRST]
  style = first.sample('a star', style_prompt='blue', steps=2)[FIRST]
  pooled = first.sample(
    'a star', style_prompt='blue', steps=2, style_fraction=0.0
  )
  assert np.abs(plain - style).max() > 1e-3
  assert np.abs(plain - pooled[FIRST]).max() > 1e-3
  assert np.abs(style - pooled[FIRST]).max() > 1e-3


def test_padding_is_read_and_embeddings_are_kept(folder, tmp_path, monkeypatch):
  where = folder / FIRST
  made = text.embed(['a star', ''], where, cache=tmp_path)
  assert made.shape == (2, 77, 32) and np.abs(made).min(axis=-1).max() > 0
  # In the empty prompt only </s> is attended to, so all padding is equal.
  np.testing.assert_allclose(made[1, 1:], made[1, 1:2].repeat(76, 0), atol=1e-5)
  assert np.abs(made[1, 0] - made[1, 1]).max() > 1e-3
  monkeypatch.setattr(text, 'encoder', None)  # T5 is not needed again
  again = text.embed(['', 'a star'], where, cache=tmp_path)
  np.testing.assert_array_equal(again, made[::-1])
  with pytest.raises(TypeError):
    text.embed(['another'], where, cache=tmp_path)


def test_reference_vector_is_compared(folder, tmp_path, capsys):
  where = folder / FIRST
  exact = text.embed([''], where)[0]
  np.save(tmp_path / 'zero.npy', exact.astype(np.float16))
  result = text.check_reference(where, tmp_path / 'zero.npy', 'float32')
  assert result['cosine'] > 0.99999 and result['error'] < 1e-3
  np.save(tmp_path / 'other.npy', exact[::-1])
  assert (
    text.check_reference(where, tmp_path / 'other.npy', 'float32')['error']
    > 0.01
  )
  argv = ['--model', str(where), '--dtype', 'float32', '--reference']
  assert check_t5_xxl.main([*argv, str(tmp_path / 'zero.npy')]) == 0
  assert '1.0000' in capsys.readouterr().out
  assert check_t5_xxl.main([*argv, str(tmp_path / 'other.npy')]) == 4
  np.save(tmp_path / 'short.npy', exact[:5])
  with pytest.raises(ModelError):
    text.check_reference(where, tmp_path / 'short.npy', 'float32')


def test_the_grid_of_a_stage_can_be_chosen(model):
  part = model.stages[0]
  last = part.schedule.num_train_timesteps - 1
  made = [
    settings.plan(part, settings.Settings(steps=4, grid=grid), False).t
    for grid in ('leading', 'trailing', None)
  ]
  assert made[0][0] < last == made[1][0]
  default = schedule.timesteps(part.schedule, 4)
  np.testing.assert_array_equal(made[2], default)


@pytest.mark.parametrize(
  'key, asked',
  [
    ('grid', {'grid': 'trailing', 'sampler': 'dpmpp'}),
    ('steps', {'steps': [4]}),
    ('steps', {'steps': 'smart28'}),
    ('sampler', {'sampler': 'euler'}),
    ('aug_level', {'aug_level': 1.0}),
    ('strength', {'strength': 0.0}),
    ('strength', {'strength': 0.5}),
    ('style_fraction', {'style_prompt': 'blue', 'style_fraction': 2.0}),
    ('style_fraction', {'style_fraction': 0.5}),
    ('negative_prompt', {'negative_prompt': 'a circle', 'guidance': 1.0}),
    ('mask', {'mask': photo().convert('L')}),
    ('mask', {'image': photo(), 'mask': photo(8, 4).convert('L')}),
    ('low_res', {'low_res': photo()}),
    ('num_images', {'num_images': 0}),
    ('seed', {'seed': -1}),
  ],
)
def test_impossible_requests_are_refused(model, key, asked):
  with pytest.raises(UsageError) as caught:
    model.sample('a star', **asked)
  assert caught.value.key == key


def test_folders_that_cannot_work_are_refused(folder, tmp_path):
  with pytest.raises(ModelError):
    pipeline.load(tmp_path)
  with pytest.raises(UsageError):
    pipeline.load(folder, stages=['IF-III'])
  shutil.copytree(folder, tmp_path / 'IF')
  shutil.copytree(folder / FIRST, tmp_path / 'IF' / 'IF-I-M-v1.0')
  with pytest.raises(ModelError):
    pipeline.load(tmp_path / 'IF')
  shutil.rmtree(tmp_path / 'IF' / FIRST / 'text_encoder')
  one = pipeline.load(tmp_path / 'IF' / FIRST, dtype='float32')
  with pytest.raises(ModelError):
    one.embed(['a star'])


def test_upsampling_keeps_corners_and_straight_lines():
  ramp = np.linspace(-1, 1, 4)[None, :, None, None] + np.zeros((1, 4, 3, 2))
  out = np.asarray(images.upsample(jnp.asarray(ramp), 16, 5))
  expected = np.linspace(-1, 1, 16)[None, :, None, None]
  np.testing.assert_allclose(out, expected + np.zeros((1, 16, 5, 2)), atol=1e-6)


def test_an_aspect_ratio_is_two_positive_numbers():
  assert image_io.shaped(*images.parse_aspect('3:2'), 64) == (96, 64)
  assert image_io.shaped(*images.parse_aspect('9:16'), 64) == (64, 112)
  for text_ in ('3x2', '3', '0:1'):
    with pytest.raises(UsageError):
      images.parse_aspect(text_)


def test_sample_py_generates_with_an_if_folder(folder, tmp_path, capsys):
  photo().save(tmp_path / 'in.png')
  argv = ['--model', str(folder), '--prompt', 'A star', '--seed', '3']
  argv += ['--steps', 'super27,2', '--dtype', 'float32']
  argv += ['--stages', f'{FIRST},{SECOND}', '--out', str(tmp_path / 'out')]
  argv += ['--init_image', str(tmp_path / 'in.png'), '--strength', '0.1,1']
  argv += ['--text_cache', str(tmp_path / 'cache'), '--guidance', '1']
  assert sample.main(argv) == 0
  files = capsys.readouterr().out.split()
  with Image.open(files[0]) as image:
    assert image.size == (64, 32)
    record = json.loads(image.text['imagen_jax'])
  assert record['prompt'] == 'A star' and record['seed'] == 3
  assert len(list((tmp_path / 'cache').glob('*.npy'))) == 2
  assert sample.main(['--from_image', files[0]]) == 2


def test_a_stage_of_our_own_upsamples_what_if_generated(
  folder, tmp_path, capsys
):
  ours = tiny_model.write(tmp_path / 'ours')
  # Of one program with `generated`.
  argv = ['--model', str(folder), '--prompt', 'a star', '--steps', '4']
  argv += ['--dtype', 'float32', '--guidance', '3', '--batch_size', '4']
  argv += ['--out', str(tmp_path)]
  first = ['--stages', FIRST]
  assert sample.main([*argv, *first, '--upsample_with', f'{ours}/sr1']) == 0
  with Image.open(capsys.readouterr().out.split()[0]) as image:
    assert image.size == (16, 16)  # 8 pixels from IF, doubled by sr1
  # A model that starts from text alone, and one with another input size.
  for folder_of_ours, stages_ in ((ours, first), (f'{ours}/sr1', [])):
    more = [*stages_, '--upsample_with', str(folder_of_ours)]
    assert sample.main([*argv, *more]) == 2
    assert '--upsample_with' in capsys.readouterr().err


def test_flags_of_if_are_refused_elsewhere(capsys):
  assert sample.main(['--prompt', 'a star', '--style_prompt', 'blue']) == 2
  assert '--style_prompt' in capsys.readouterr().err


@pytest.mark.parametrize(
  'flag, more',
  [
    ('threshold', ['static']),
    ('grid', ['logsnr']),
    ('grid', ['trailing', '--steps', 'smart50']),
    ('guidance_rescale', ['0.5']),
    ('weak_model', ['elsewhere']),
    ('strength', ['0.5']),
    ('style_fraction', ['0.5']),
    ('aspect_ratio', ['3:2', '--init_image', 'in.png']),
    ('aspect_ratio', ['3x2']),
  ],
)
def test_flags_without_effect_are_refused(folder, tmp_path, capsys, flag, more):
  photo().save(tmp_path / 'in.png')
  more = [str(tmp_path / word) if word == 'in.png' else word for word in more]
  argv = ['--model', str(folder), '--prompt', 'a star', f'--{flag}', *more]
  assert sample.main(argv) == 2
  assert f'--{flag}' in capsys.readouterr().err


def test_cleaning_falls_back_where_packages_are_missing(monkeypatch, capsys):
  monkeypatch.setattr(
    cleaning.importlib.util,
    'find_spec',
    lambda name: None if name == 'ftfy' else name,
  )
  assert cleaning.cleaner(True)('  A Star ') == 'a star'
  assert 'ftfy' in capsys.readouterr().err
  assert cleaning.cleaner(False)('  A Star ') == 'a star'


@pytest.mark.parametrize(
  'given, expected',
  [
    ('A <b>red</b> CIRCLE', 'a red circle'),
    ('see https://example.com/x a cat', 'see a cat'),
    ('this-is-my-cute-cat', 'this is my cute cat'),
    ('“quoted” – dash', '"quoted" - dash'),
    ('cat jc6640 10x20 free shipping', 'cat'),
  ],
)
def test_captions_are_cleaned_like_ifs(given, expected):
  pytest.importorskip('bs4')
  pytest.importorskip('ftfy')
  assert cleaning.cleaner(True)(given) == expected


def test_text_encoder_of_a_stage_is_read_in_any_variant(folder, tmp_path):
  path = shutil.copytree(folder / FIRST, tmp_path / 'stage') / 'text_encoder'
  (path / text_weights.SINGLE).rename(path / 'model.fp16.safetensors')
  np.testing.assert_array_equal(
    text.embed(['a star'], tmp_path / 'stage'),
    text.embed(['a star'], folder / FIRST),
  )
