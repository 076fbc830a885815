"""From prompts to images with a tiny random cascade."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import imagen_jax
from imagen_jax import sharding
from imagen_jax.cascade import batching, conditioning, sampling
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import images as image_io
from imagen_jax.io import model_folder
from tests import tiny_model

RED, BLUE = 'a red circle', 'a blue square above a star'


@pytest.fixture(scope='module')
def cascade(model):
  return imagen_jax.load(model)


def generate(cascade, prompts, **kw):
  kw.setdefault('batch_size', 2)
  return cascade.sample(prompts, **kw)


def test_every_stage_gives_its_images(cascade):
  out = generate(cascade, [RED, BLUE], num_images=2)
  assert list(out) == ['base', 'sr1']
  assert out['base'].shape == (4, 8, 8, 3)
  assert out['sr1'].shape == (4, 16, 16, 3)
  assert out['sr1'].dtype == np.uint8


def test_an_image_does_not_depend_on_its_batch(cascade):
  alone = generate(cascade, [BLUE])['sr1'][0]
  among = generate(cascade, [RED, 'a star', BLUE])['sr1'][2]
  np.testing.assert_array_equal(alone, among)
  third = generate(cascade, [BLUE], indices=[2])['sr1'][0]
  np.testing.assert_array_equal(
    third, generate(cascade, [BLUE], num_images=3)['sr1'][2]
  )


def test_batch_size_changes_at_most_two_grey_levels(cascade):
  a = generate(cascade, [BLUE], batch_size=1)['sr1'].astype(int)
  b = generate(cascade, [BLUE], batch_size=2)['sr1'].astype(int)
  assert np.abs(a - b).max() <= 2


def test_seed_prompt_and_index_all_matter(cascade):
  one = generate(cascade, [RED])['base'][0]
  for other in (
    generate(cascade, [RED], seed=1)['base'][0],
    generate(cascade, [BLUE])['base'][0],
    generate(cascade, [RED], indices=[1])['base'][0],
  ):
    assert np.abs(one.astype(int) - other).max() > 8


def programs(cascade, **choices):
  """The number of compiled programs of each stage."""
  runs = cascade._runs(cascade.settings(**choices))
  return [len(run.program) for run in runs]


def test_guidance_and_augmentation_matter_and_need_no_new_compilation(cascade):
  first = generate(cascade, [RED])
  before = programs(cascade)
  strong = generate(cascade, [RED], guidance=[4.0, 1.0])
  assert (first['base'] != strong['base']).any()
  low = generate(cascade, [RED], aug_level=[0, 0.9])
  np.testing.assert_array_equal(first['base'], low['base'])
  assert (first['sr1'] != low['sr1']).any()
  assert programs(cascade) == before
  generate(cascade, [RED], guidance=[1.0, 1.0])  # one branch instead of two
  assert programs(cascade) == [before[0] + 1, before[1]]


def test_an_empty_prompt_is_unconditional(cascade):
  """Guidance has no effect: both branches have the null condition."""
  a = generate(cascade, [''], guidance=3.0)['base'].astype(int)
  b = generate(cascade, [''], guidance=7.0)['base'].astype(int)
  assert np.abs(a - b).max() <= 1
  assert (generate(cascade, ['red'])['base'] != a).any()


def test_a_negative_prompt_replaces_the_null_condition(model):
  """The same prompt on both branches leaves nothing to guide."""
  cascade = imagen_jax.load(model, dtype='float32', stages=['base'])
  alone = generate(cascade, [RED], guidance=1.0)['base'].astype(int)
  away = generate(cascade, [RED, BLUE], guidance=3.0, negative_prompt=RED)
  assert np.abs(away['base'][0] - alone[0]).max() <= 1
  plain = generate(cascade, [RED, BLUE], guidance=3.0)['base'].astype(int)
  assert (np.abs(away['base'] - plain).max(axis=(1, 2, 3)) > 8).all()
  embedding = cascade.embed([RED, BLUE], RED)
  again = generate(cascade, embedding, guidance=3.0)['base']
  np.testing.assert_array_equal(again, away['base'])
  with pytest.raises(UsageError) as caught:
    generate(cascade, embedding, guidance=3.0, negative_prompt=BLUE)
  assert caught.value.key == 'negative_prompt'


@pytest.fixture(scope='module')
def weak(model, tmp_path_factory):
  """A folder with a smaller network of stage base."""
  return tiny_model.write_weak(tmp_path_factory.mktemp('weak'), model)


def test_autoguidance_steers_away_from_a_weaker_model(model, weak):
  sample = functools.partial(generate, prompts=[RED], guidance=1.0)
  load = functools.partial(
    imagen_jax.load, model, dtype='float32', stages=['base']
  )
  guided, same = load(weak_model=weak), load(weak_model=model / 'base')
  plain = sample(load())['base'].astype(int)
  np.testing.assert_array_equal(plain, sample(guided)['base'])
  # w = 0 is the weaker model, and a model does not steer away from itself.
  away = sample(guided, autoguidance=3.0)['base'].astype(int)
  assert np.abs(away - plain).max() > 8
  itself = sample(same, autoguidance=3.0)['base']
  assert np.abs(itself - plain).max() <= 1
  other = sample(guided, autoguidance=0.0)['base']
  alone = imagen_jax.load(weak, dtype='float32')
  assert np.abs(sample(alone)['base'] - other.astype(int)).max() <= 1
  both = sample(guided, autoguidance=3.0, guidance=2.0)['base']
  assert np.abs(both - away).max() > 8


def test_a_weaker_model_is_one_of_the_same_stage(model, weak, tmp_path):
  with pytest.raises(UsageError) as caught:
    imagen_jax.load(model, stages=['sr1'], weak_model=weak)
  assert caught.value.key == 'weak_model'
  for change in (
    lambda record: record['config']['stage'].update(prediction='eps'),
    lambda record: record['text'].update(digest='0'),
  ):
    copy = shutil.copytree(weak, tmp_path / 'm', dirs_exist_ok=True)
    record = json.loads((copy / 'base' / 'stage.json').read_text())
    change(record)
    (copy / 'base' / 'stage.json').write_text(json.dumps(record))
    with pytest.raises(ModelError):
      imagen_jax.load(model, weak_model=copy)


def test_later_stages_upsample_a_given_image(model):
  later = imagen_jax.load(model, stages=['sr1'])
  low = np.full((1, 8, 8, 3), 200, np.uint8)
  a = generate(later, [RED], low_res=low)['sr1']
  b = generate(later, [RED], low_res=low // 4)['sr1']
  assert a.shape == (1, 16, 16, 3) and (a != b).any()
  for low_res in (None, np.zeros((2, 8, 8, 3), np.uint8)):
    with pytest.raises(UsageError) as caught:
      generate(later, [RED], low_res=low_res)
    assert caught.value.key == 'low_res'


def test_a_cascade_equals_its_stages_run_one_by_one(model, cascade):
  whole = generate(cascade, [RED], aug_level=0.0)
  later = imagen_jax.load(model, stages=['sr1'])
  again = generate(later, [RED], low_res=whole['base'], aug_level=0.0)['sr1']
  # Stages pass floats to one another; a user's image has 8 bits.
  assert np.abs(again.astype(int) - whole['sr1']).mean() < 2


def test_an_embedding_gives_the_images_of_its_prompts(cascade):
  embedding = cascade.embed([RED])
  np.testing.assert_array_equal(
    generate(cascade, embedding)['base'], generate(cascade, [RED])['base']
  )


@pytest.mark.parametrize(
  'key, choices',
  [
    ('steps', {'steps': 0}),
    ('steps', {'steps': [3, 2, 1]}),
    ('sampler', {'sampler': 'euler'}),
    ('aug_level', {'aug_level': 1.5}),
    ('percentile', {'percentile': 0.0}),
    ('threshold', {'threshold': 'hard'}),
    ('grid', {'grid': 'sigma'}),
    ('guidance_interval', {'guidance_interval': (3.0, -2.0)}),
    ('gamma', {'gamma': 0.5}),  # neither stage samples with ddpm
    ('guidance_rescale', {'guidance': 1.0, 'guidance_rescale': 0.7}),
    ('apg_eta', {'guidance': 1.0, 'apg_eta': 0.0}),
    ('guidance_schedule', {'guidance_schedule': (0.0,)}),
    ('autoguidance', {'autoguidance': -1.0}),
    ('autoguidance', {'autoguidance': 2.0}),  # without a weaker model
    ('negative_prompt', {'guidance': 1.0, 'negative_prompt': 'a star'}),
    ('seed', {'seed': -1}),
    ('num_images', {'num_images': 0}),
    ('low_res', {'low_res': np.zeros((1, 8, 8, 3), np.uint8)}),
    ('strength', {'strength': 0.5}),
  ],
)
def test_bad_choices_are_refused(cascade, key, choices):
  with pytest.raises(UsageError) as caught:
    generate(cascade, [RED], **choices)
  assert caught.value.key == key


def test_the_grid_interval_and_options_reach_the_sampler(model):
  cascade = imagen_jax.load(model, dtype='float32', stages=['base'])
  plain = generate(cascade, [RED], steps=4)['base']
  for choices in (
    {'grid': 'logsnr'},
    {'guidance_interval': (-1.0, 1.0)},
    {'sampler': 'ddim', 'eta': 1.0},
    {'sampler': 'dpmpp_sde'},
    {'guidance_schedule': (0.0, 1.0)},
    {'apg_momentum': -0.5},
  ):
    assert (generate(cascade, [RED], steps=4, **choices)['base'] != plain).any()


def test_a_trajectory_ends_with_the_image(model, cascade):
  """The trajectory uses the noise of `sample`: image 0 of a prompt."""
  stage, config = cascade.stages[0], cascade.settings()[0]
  params = model_folder.load_params(model_folder.load_stage(model / 'base'))
  embedding = cascade.embed([RED])
  key = jax.random.fold_in(batching.image_key(0, RED, 0), stage.resolution)
  inputs = sampling.SampleInputs(
    keys=key[None], text=embedding.text, mask=embedding.mask, **config.scalars
  )
  path = sampling.trajectory(stage, params, config.spec, inputs)
  assert path.z.shape == (config.steps, 1, 8, 8, 3)
  last = conditioning.to_uint8(path.x[-1]).astype(int)
  image = generate(cascade, [RED])['base']
  assert np.abs(last - image).max() <= 2  # another program rounds differently


def test_guidance_needs_a_model_trained_with_caption_dropout(model, tmp_path):
  copy = shutil.copytree(model, tmp_path / 'm')
  record = json.loads((copy / 'base' / 'stage.json').read_text())
  record['config']['stage']['cond_drop'] = 0.0
  (copy / 'base' / 'stage.json').write_text(json.dumps(record))
  with pytest.raises(UsageError) as caught:
    generate(imagen_jax.load(copy), [RED], guidance=3.0)
  assert caught.value.key == 'guidance'


def test_another_text_encoder_is_refused(model, tmp_path):
  from tests import tiny_text

  copy = shutil.copytree(model, tmp_path / 'm')
  shutil.rmtree(copy / 'text')
  tiny_text.random_folder(copy / 'text', seed=5)
  with pytest.raises(ModelError):
    generate(imagen_jax.load(copy), [RED])


def test_an_encoder_of_another_kind_is_refused_when_a_model_is_opened(
  model, tmp_path
):
  from tests import tiny_encoders

  copy = shutil.copytree(model, tmp_path / 'm')
  shutil.rmtree(copy / 'text')
  tiny_encoders.write(copy / 'text', 'bert')
  with pytest.raises(ModelError):
    imagen_jax.load(copy)


def test_a_model_of_bert_generates_with_it_and_not_as_another_kind(tmp_path):
  from tests import tiny_encoders

  tiny_encoders.write(tmp_path / 'text', 'bert')
  tiny_model.write(tmp_path, kind='bert')
  found = imagen_jax.load(tmp_path)
  assert np.ptp(generate(found, [RED])['sr1']) > 0
  record = json.loads((tmp_path / 'base' / 'stage.json').read_text())
  assert record['text']['kind'] == 'bert'
  for name in ('base', 'sr1'):
    file = tmp_path / name / 'stage.json'
    record = json.loads(file.read_text())
    record['text']['kind'] = 'clip'
    file.write_text(json.dumps(record))
  with pytest.raises(ModelError):
    imagen_jax.load(tmp_path)


def test_progress_is_reported(cascade):
  calls = []
  generate(cascade, [RED], num_images=3, callback=lambda *a: calls.append(a))
  assert calls == [('base', 2, 3), ('base', 3, 3), ('sr1', 2, 3), ('sr1', 3, 3)]


@pytest.mark.slow
def test_a_network_split_over_devices_generates_the_same(model, monkeypatch):
  split = functools.partial(sharding.leaf_sharding, min_size=1)
  monkeypatch.setattr(sharding, 'leaf_sharding', split)
  put, sizes = jax.device_put, []

  def device_put(x, where):
    array = put(x, where)
    sizes.append((array.addressable_shards[0].data.size, array.size))
    return array

  monkeypatch.setattr(jax, 'device_put', device_put)
  whole = generate(imagen_jax.load(model), [BLUE, RED])
  assert all(here == size for here, size in sizes)
  sizes.clear()
  spread = generate(imagen_jax.load(model, fsdp=4), [BLUE, RED])
  here, size = np.sum(sizes, axis=0)
  assert here < 0.3 * size
  for name in ('base', 'sr1'):
    difference = np.abs(whole[name].astype(int) - spread[name])
    assert difference.max() <= 2


def given_image():
  pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
  mask = np.zeros((8, 16), np.uint8)
  mask[2:6, 3:11] = 255
  return Image.fromarray(pixels), Image.fromarray(mask)


def test_inpainting_keeps_the_rest_to_the_bit_in_any_shape(cascade):
  image, mask = given_image()
  out = generate(cascade, [RED], image=image, mask=mask)
  kept = np.asarray(mask) == 0
  np.testing.assert_array_equal(out['base'][0][kept], np.asarray(image)[kept])
  assert (out['base'][0] != np.asarray(image))[~kept].mean() > 0.9
  assert out['sr1'].shape == (1, 16, 32, 3)
  large = image_io.to_mask(mask, 32, 16)[..., 0] == 0
  resized = conditioning.to_uint8(image_io.to_float(image, 32, 16))
  np.testing.assert_array_equal(out['sr1'][0][large], resized[large])


def test_a_given_image_is_resized_as_the_stages_training_images(
  model, tmp_path
):
  copy = shutil.copytree(model, tmp_path / 'm')
  path = copy / 'base' / 'stage.json'
  record = json.loads(path.read_text())
  record['config']['data']['resize'] = 'lanczos'
  path.write_text(json.dumps(record))
  pixels = np.random.default_rng(0).integers(0, 256, (24, 48, 3), np.uint8)
  image, mask = Image.fromarray(pixels), Image.new('L', (48, 24))
  mask.paste(255, (0, 0, 24, 24))  # the left half
  out = generate(imagen_jax.load(copy), [RED], image=image, mask=mask)
  for name, width, rule in ('base', 16, 'lanczos'), ('sr1', 32, 'area'):
    expected = image_io.to_float(image, width, width // 2, rule)
    kept = out[name][0][:, width // 2 :]
    expected = conditioning.to_uint8(expected)[:, width // 2 :]
    np.testing.assert_array_equal(kept, expected)


def test_the_shape_of_a_given_image_is_kept_as_far_as_the_networks_allow(
  cascade,
):
  multiples = {s.name: s.net.multiple for s in cascade.stages}
  assert multiples == {'base': 1, 'sr1': 4} and cascade.multiple == 2
  for size, shape in ((40, 30), (10, 8)), ((30, 50), (8, 14)):
    image = Image.new('RGB', size)
    assert cascade.shape_for(image) == shape
    out = generate(cascade, [RED], image=image, strength=0.5, steps=2)
    assert out['sr1'].shape == (1, 2 * shape[1], 2 * shape[0], 3)


def test_a_given_pillow_image_of_any_kind_is_read_as_an_rgb_one(cascade):
  image, mask = given_image()
  clear = Image.new('L', image.size, 0)
  white = Image.new('RGB', image.size, 'white')
  hidden = image.copy()
  hidden.putalpha(clear)
  alpha = white.copy()
  alpha.putalpha(mask)
  a = generate(cascade, [RED], image=hidden, mask=alpha)
  b = generate(cascade, [RED], image=white, mask=mask)
  np.testing.assert_array_equal(a['sr1'], b['sr1'])


def test_a_start_from_an_image_stays_near_it(cascade):
  image, _ = given_image()

  def distance(steps, strength):  # three of the steps: one program for both
    options = dict(image=image, strength=strength, steps=steps)
    out = generate(cascade, [RED], **options)['base'].astype(int)
    return np.abs(out - np.asarray(image)).mean()

  assert distance(15, 0.2) < distance(3, 1.0)


def test_images_that_cannot_be_started_from_are_refused(cascade):
  image, mask = given_image()
  for key, asked in (
    ('mask', {'mask': mask}),
    ('mask', {'image': image, 'mask': mask.resize((4, 4))}),
    ('strength', {'image': image, 'strength': 0.0}),
    ('strength', {'image': image, 'strength': 1.5}),
  ):
    with pytest.raises(UsageError) as caught:
      generate(cascade, [RED], **asked)
    assert caught.value.key == key
