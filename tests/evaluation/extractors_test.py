"""CLIP and Inception with a user's weights, checked by name and shape."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from imagen_jax.errors import ModelError, UsageError
from imagen_jax.evaluation import (
  clip,
  efficientnet,
  extractors,
  inception,
  weights,
)
from tests import tiny_clip

PROMPTS = ['a red star', 'two blue moons, a cat', 'zebra']
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)


def inception_shapes():
  module = inception.InceptionV3()
  example = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), example)['params']


def efficientnet_shapes():
  module = efficientnet.EfficientNetLite0()
  example = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), example)['params']


def random_inception():
  return random_tensors(inception_shapes())


def random_tensors(shapes):
  rng = np.random.default_rng(0)
  tensors = {}
  for name, s in shapes.items():
    tensors[name] = rng.normal(size=s.shape).astype(np.float32)
    if len(s.shape) == 4:
      tensors[name] *= (2 / np.prod(s.shape[1:])) ** 0.5
    elif name.endswith(('running_var', '.weight')):
      tensors[name] = 1 + 0.3 * np.abs(tensors[name])
    else:
      tensors[name] *= 0.1
  return tensors


def test_inception_has_the_published_tensors():
  shapes = inception_shapes()
  assert len(shapes) == 94 * 5
  sizes = {name: int(np.prod(s.shape)) for name, s in shapes.items()}
  learned = [n for n in sizes if 'running' not in n]
  # InceptionV3 has 23,834,568 parameters without its auxiliary classifier;
  # 2048·1000 + 1000 of them are in the classifier.
  assert sum(sizes[n] for n in learned) == 23_834_568 - 2_049_000
  assert shapes['Mixed_6b.branch7x7dbl_5.conv.weight'].shape == (192, 128, 1, 7)
  assert shapes['Mixed_7c.branch_pool.conv.weight'].shape == (192, 2048, 1, 1)
  assert shapes['Conv2d_1a_3x3.bn.running_mean'].shape == (32,)


def test_efficientnet_has_the_published_tensors():
  shapes = efficientnet_shapes()
  assert len(shapes) == 49 * 5  # a stem, 15 expansions, 16 + 16, a head
  learned = [s for name, s in shapes.items() if 'running' not in name]
  # Lite0 has 4,652,008 parameters; 1280·1000 + 1000 are in the classifier.
  assert sum(int(np.prod(s.shape)) for s in learned) == 4_652_008 - 1_281_000
  assert shapes['_blocks.3._depthwise_conv.weight'].shape == (144, 1, 5, 5)


@pytest.mark.parity
def test_efficientnet_equals_the_package(tmp_path):
  torch = pytest.importorskip('torch')
  package = pytest.importorskip('efficientnet_lite_pytorch')
  tensors = random_tensors(efficientnet_shapes())
  rest = {'_fc.weight': np.zeros((1000, 1280), np.float32)}
  rest['_fc.bias'] = np.zeros(1000, np.float32)
  save_file(tensors | rest, tmp_path / 'w.safetensors')
  network = package.EfficientNet.from_name('efficientnet-lite0').eval()
  state = {k: torch.from_numpy(v) for k, v in (tensors | rest).items()}
  assert not network.load_state_dict(state, strict=False).unexpected_keys
  images = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3), np.uint8)
  x = (images.astype(np.float32) - efficientnet.MEAN) / efficientnet.STD
  with torch.no_grad():
    maps = network.extract_features(torch.tensor(x).permute(0, 3, 1, 2).float())
  expected = maps.mean((2, 3)).numpy()
  ours = extractors.load_efficientnet(tmp_path / 'w.safetensors')
  difference = np.abs(ours.image(images) - expected).max() / expected.max()
  print(f'largest difference {difference:.1e} of the largest feature')
  assert difference < 1e-4 and expected.std() > 0.01


@pytest.mark.slow
def test_inception_is_read_from_an_npz_file(tmp_path):
  path = tmp_path / 'inception.npz'
  np.savez(path, **random_inception(), **{'fc.weight': np.zeros((1008, 2048))})
  found = extractors.load_inception(path)
  features = found.image(IMAGES[:2])
  assert features.shape == (2, 2048) and np.isfinite(features).all()
  assert len(found.digest) == 64 and found.preprocessing == 'clean'


def test_an_unknown_mode_of_the_fid_is_refused(tmp_path):
  with pytest.raises(UsageError) as error:
    extractors.load_inception(tmp_path / 'w.npz', 'legacy')
  assert error.value.key == 'fid_mode'


def stripes(side, period):
  """Black, with every `period`-th column white, the middle one of each."""
  image = np.zeros((1, side, side, 3), np.uint8)
  image[:, :, period // 2 :: period] = 255
  return image


def test_only_the_mode_clean_antialiases():
  # Bilinear samples the middle of every three columns, which are all white.
  image = stripes(3 * 299, 3)
  np.testing.assert_allclose(inception.pytorch_fid(image), 1, atol=1e-6)
  mean = inception.clean(image)[:, :, 3:-3].mean()
  assert mean == pytest.approx((255 / 3 - 128) / 128, abs=1e-3)


def test_images_are_neither_rounded_nor_resized_without_need():
  grey = np.arange(256, dtype=np.uint8)[None, :, None, None]
  grey = np.broadcast_to(grey, (1, 256, 256, 3))
  levels = inception.clean(grey) * 128 + 128
  assert np.abs(levels - levels.round()).max() > 0.4
  same = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
  found = inception.clean(same)
  np.testing.assert_array_equal(found, (same - np.float32(128)) / 128)
  found = inception.pytorch_fid(same)
  np.testing.assert_allclose(found, same / np.float32(127.5) - 1, atol=1e-6)


def test_clips_features_do_not_depend_on_the_batch(tmp_path):
  tiny_clip.write(tmp_path)
  found = extractors.load_clip(tmp_path)
  images, texts = found.image(IMAGES), found.text(PROMPTS)
  assert images.shape == texts.shape == (3, tiny_clip.PROJECTION)
  # The features of an image or prompt do not depend on the rest of a batch.
  np.testing.assert_array_equal(found.image(IMAGES[1:2]), images[1:2])
  np.testing.assert_array_equal(found.text(PROMPTS[2:]), texts[2:])
  long = found.text(['abcdefghij' * 9])  # truncated, with its end token
  assert np.isfinite(long).all()


def break_name(tensors):
  tensors['text_model.final_layer_norm.w'] = tensors.pop(
    'text_model.final_layer_norm.weight'
  )


def break_shape(tensors):
  tensors['visual_projection.weight'] = np.zeros((3, 3), np.float32)


def add_tensor(tensors):
  tensors['decoder.weight'] = np.zeros(3, np.float32)


@pytest.mark.parametrize('damage', [break_name, break_shape, add_tensor])
def test_other_weights_are_refused_by_name_and_shape(tmp_path, damage):
  tensors = tiny_clip.write(tmp_path)
  damage(tensors)
  tensors = {k: np.asarray(v) for k, v in tensors.items()}
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(ModelError):
    extractors.load_clip(tmp_path)


class Trap:
  """An object whose unpickling prints."""

  def __reduce__(self):
    return (print, ('unpickled',))


def test_nothing_is_unpickled(tmp_path, capsys):
  (tmp_path / 'w.pt').write_bytes(pickle.dumps(Trap()))
  with pytest.raises(ModelError):
    weights.read_tensors(tmp_path / 'w.pt')
  np.savez(tmp_path / 'w.npz', a=np.array([Trap()], object))
  with pytest.raises(ModelError):
    weights.read_tensors(tmp_path / 'w.npz')
  (tmp_path / 'w.safetensors').write_bytes(pickle.dumps(Trap()))
  with pytest.raises(ModelError):
    weights.read_tensors(tmp_path / 'w.safetensors')
  assert 'unpickled' not in capsys.readouterr().out


def test_a_broken_clip_folder_is_a_model_error(tmp_path):
  with pytest.raises(ModelError):
    extractors.load_clip(tmp_path)
  tiny_clip.write(tmp_path)
  (tmp_path / 'vocab.json').unlink()
  with pytest.raises(ModelError):
    extractors.load_clip(tmp_path)
  config = json.loads((tmp_path / 'config.json').read_text())
  config['text_config']['hidden_act'] = 'relu'
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ModelError):
    extractors.load_clip(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize('act, eos', [('quick_gelu', None), ('gelu', 2)])
def test_clip_equals_transformers(tmp_path, act, eos):
  torch = pytest.importorskip('torch')
  from transformers import CLIPModel, CLIPTokenizer

  tiny_clip.write(tmp_path, act, **({'eos_token_id': eos} if eos else {}))
  theirs = CLIPModel.from_pretrained(tmp_path).eval()
  ours = extractors.load_clip(tmp_path)
  tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
  ids = tokenizer(
    PROMPTS,
    return_tensors='pt',
    padding='max_length',
    max_length=tiny_clip.LENGTH,
    truncation=True,
  )['input_ids']
  images = IMAGES[:, 2:18, 2:18]
  x = images.astype(np.float32) / 255
  x = (x - np.float32(clip.MEAN)) / np.float32(clip.STD)
  pixels = torch.from_numpy(x).permute(0, 3, 1, 2)
  with torch.no_grad():
    out = theirs(input_ids=ids, pixel_values=pixels)

  def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)

  for found, expected in (
    (ours.text(PROMPTS), out.text_embeds),
    (ours.image(images), out.image_embeds),
  ):
    difference = np.abs(unit(found) - expected.numpy()).max()
    print(f'largest difference {difference:.1e}')
    assert difference < 2e-6


def pytorch_fid(tensors, monkeypatch):
  """The package's Inception, with these weights."""
  torch = pytest.importorskip('torch')
  package = pytest.importorskip('pytorch_fid.inception')
  state = {k: torch.from_numpy(v) for k, v in tensors.items()}
  state['fc.weight'] = torch.zeros(1008, 2048)
  state['fc.bias'] = torch.zeros(1008)
  monkeypatch.setattr(
    package, 'load_state_dict_from_url', lambda *_, **__: state
  )
  return package.InceptionV3().eval()


def features_of_clean_fid(images, network, folder):
  torch = pytest.importorskip('torch')
  resize = pytest.importorskip('cleanfid.resize').build_resizer('clean')
  package = pytest.importorskip('cleanfid.inception_torchscript')

  class Published(torch.nn.Module):
    """The interface of the file that clean-fid downloads."""

    def __init__(self):
      super().__init__()
      self.layers = torch.nn.Sequential(*network.blocks)

    def forward(self, x):
      return self.layers(x)

  module = torch.jit.trace(Published().eval(), torch.zeros(1, 3, 299, 299))
  module.save(folder / 'inception-2015-12-05.pt')
  x = np.stack([resize(image) for image in images]).transpose(0, 3, 1, 2)
  with torch.no_grad():
    loaded = package.InceptionV3W(str(folder), download=False)
    return loaded(torch.from_numpy(x)).numpy()


def features_of_pytorch_fid(images, network, folder):
  torch = pytest.importorskip('torch')
  x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0  # as ToTensor
  with torch.no_grad():
    return network(x)[0][:, :, 0, 0].numpy()


@pytest.mark.parity
@pytest.mark.parametrize(
  'mode, reference',
  [
    ('clean', features_of_clean_fid),
    ('pytorch-fid', features_of_pytorch_fid),
  ],
)
def test_features_equal_those_of_the_package(
  tmp_path, monkeypatch, mode, reference
):
  tensors = random_inception()
  save_file(tensors, tmp_path / 'w.safetensors')
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
  network = pytorch_fid(tensors, monkeypatch)
  expected = reference(images, network, tmp_path)
  ours = extractors.load_inception(tmp_path / 'w.safetensors', mode)
  found = ours.image(images)
  difference = np.abs(found - expected).max() / np.abs(expected).max()
  print(f'largest difference {difference:.1e} of the largest feature')
  assert difference < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize('side', [64, 256, 299, 1024])
def test_inputs_of_inception_equal_those_of_the_packages(side):
  torch = pytest.importorskip('torch')
  resize = pytest.importorskip('cleanfid.resize').build_resizer('clean')
  rng = np.random.default_rng(2)
  images = rng.integers(0, 256, (2, side, side, 3), np.uint8)
  expected = (np.stack([resize(image) for image in images]) - 128) / 128
  np.testing.assert_array_equal(inception.clean(images), expected)
  x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0
  resized = torch.nn.functional.interpolate(
    x, size=(299, 299), mode='bilinear', align_corners=False
  )
  expected = (2 * resized - 1).permute(0, 2, 3, 1).numpy()
  found = inception.pytorch_fid(images)
  np.testing.assert_allclose(found, expected, atol=1e-6)
