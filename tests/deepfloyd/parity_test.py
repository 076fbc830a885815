"""DeepFloyd IF against diffusers, with the same weights and noise.

Rounding could hide mistakes for three reasons. At step 999 the schedule
magnifies an error of the network 20,000 times, so whole runs start at step 990
or below. diffusers computes ᾱ in float32, with an error of 1e-5, so this
project's plans use its table. A random network amplifies a perturbation of its
input at every step (torch in float32 is 4e-4 to 7e-4 from torch in float64
after ten steps), so whole runs scale down the last layer.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.deepfloyd import (
  cleaning,
  images,
  sampling,
  schedule,
  stage,
  text,
  weights,
)
from tests import tiny_if, tiny_text

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
SIDE, TOKENS = 16, 7
SCHEDULER = dict(
  beta_schedule='squaredcos_cap_v2',
  variance_type='learned_range',
  thresholding=True,
  dynamic_thresholding_ratio=0.95,
  sample_max_value=1.5,
)


def nchw(x):
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x):
  return np.moveaxis(x.numpy(), 1, -1)


CALM = 0.1  # factor on the last layer's weights in whole runs


@pytest.fixture
def lent(monkeypatch):
  """Replaces the exact ᾱ by diffusers' float32 one."""

  def alphas_cumprod(made):
    oracle = diffusers.DDPMScheduler(beta_schedule=made.beta_schedule)
    return oracle.alphas_cumprod.double().numpy()

  monkeypatch.setattr(schedule, 'alphas_cumprod', alphas_cumprod)


def reference(name, **changes):
  """diffusers' network with the parameters of `tiny_if`."""
  raw = tiny_if.raw_config(name) | changes
  net = diffusers.UNet2DConditionModel.from_config(raw).eval()
  shapes = {k: v.shape for k, v in net.state_dict().items()}
  arrays = tiny_if.parameters(shapes)
  net.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()})
  return net


@pytest.mark.parametrize('name', tiny_if.CONFIGS)
def test_the_network_gives_diffusers_output(name):
  module, params = tiny_if.network(name)
  sample, t, text, level = tiny_if.inputs(tiny_if.raw_config(name))
  with torch.no_grad():
    expected = reference(name)(
      nchw(sample),
      torch.from_numpy(t),
      torch.from_numpy(text),
      class_labels=None if level is None else torch.from_numpy(level),
    )[0]
  apply = jax.jit(lambda p, *xs: module.apply({'params': p}, *xs))
  got = np.asarray(apply(params, sample, t, text, level))
  found = np.abs(got - nhwc(expected)).max()
  print(f'{name}: {found:.1e}')
  assert found < 2e-5


def test_diffusers_loads_what_is_exported_and_the_reverse(tmp_path):
  _, params = tiny_if.network('fast_2')
  weights.save(tmp_path / 'a', params, source=tiny_if.raw_config('fast_2'))
  net = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / 'a')
  expected = reference('fast_2').state_dict()
  for name, value in net.state_dict().items():
    assert torch.equal(value, expected[name]), name
  net.half().save_pretrained(tmp_path / 'b')
  _, again = weights.load(tmp_path / 'b')
  raw = json.loads((tmp_path / 'b' / 'config.json').read_text())
  weights.save(tmp_path / 'c', again, source=raw)
  from safetensors.torch import load_file

  b, c = (load_file(tmp_path / x / f'{weights.STEM}.safetensors') for x in 'bc')
  assert b.keys() == c.keys()
  assert all(torch.equal(b[name], c[name]) for name in b)


@pytest.mark.parametrize('old, new', [((4, 6), (16, 24)), ((5, 1), (10, 4))])
def test_upsampling_is_torchs_with_aligned_corners(old, new):
  rng = np.random.default_rng(0)
  image = rng.normal(size=(2, *old, 3)).astype(np.float32)
  expected = torch.nn.functional.interpolate(
    nchw(image), new, mode='bilinear', align_corners=True
  )
  np.testing.assert_allclose(
    images.upsample(jnp.asarray(image), *new), nhwc(expected), atol=2e-6
  )


def test_the_dynamic_threshold_is_diffusers():
  rng = np.random.default_rng(0)
  x = (3 * rng.normal(size=(4, 16, 16, 3))).astype(np.float32)
  oracle = diffusers.DDPMScheduler(**SCHEDULER)
  expected = nhwc(oracle._threshold_sample(nchw(x)))
  got = sampling.threshold(jnp.asarray(x), schedule.Schedule(**SCHEDULER))
  np.testing.assert_allclose(got, expected, atol=2e-6)


def test_every_step_of_ddpm_is_diffusers(lent):
  rng = np.random.default_rng(0)
  made = schedule.Schedule(**SCHEDULER)
  oracle = diffusers.DDPMScheduler(**SCHEDULER)
  steps = schedule.respaced('smart27')
  oracle.set_timesteps(timesteps=steps.tolist())
  generate = lambda c: rng.normal(size=(2, 8, 8, c)).astype(np.float32)
  for i in range(1, len(steps)):  # without step 999, see the module's docstring
    z, out, fresh = generate(3), generate(6), generate(3)
    out[..., 3:] = np.tanh(out[..., 3:])
    diffusers.schedulers.scheduling_ddpm.randn_tensor = (
      lambda *a, _n=fresh, **k: nchw(_n)
    )
    expected = oracle.step(nchw(out), int(steps[i]), nchw(z)).prev_sample
    plan = schedule.plan(made, steps)
    row = schedule.Plan(*(column[i : i + 1] for column in plan))
    got = sampling.sample(
      lambda z, t, out=out: (out[..., :3], out[..., 3:]),
      row,
      jnp.asarray(z),
      lambda i, fresh=fresh: fresh,
      made,
    )
    np.testing.assert_allclose(got, nhwc(expected), atol=2e-5)


def test_dpmpp_follows_diffusers_over_a_run(lent):
  made = schedule.Schedule(**SCHEDULER)
  options = {**SCHEDULER, 'lambda_min_clipped': -5.1}
  options.pop('variance_type')
  oracle = diffusers.DPMSolverMultistepScheduler(**options)
  oracle.set_timesteps(20)
  steps = schedule.timesteps(made, 20, 'dpmpp')
  assert steps.tolist() == oracle.timesteps.tolist()
  rng = np.random.default_rng(0)
  z = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
  expected = nchw(z)
  for t in oracle.timesteps:
    out = torch.tanh(1.3 * expected)
    expected = oracle.step(out, t, expected).prev_sample
  got = sampling.sample(
    lambda z, t: (jnp.tanh(1.3 * z), None),
    schedule.plan(made, steps, 'dpmpp'),
    jnp.asarray(z),
    lambda i: 0.0,
    made,
  )
  np.testing.assert_allclose(got, nhwc(expected), atol=1e-4)


def test_text_is_what_transformers_makes_of_it_padding_included(tmp_path):
  transformers = pytest.importorskip('transformers')
  tiny_text.random_folder(tmp_path / 'text_encoder', width=32)
  (tmp_path / 'tokenizer').mkdir()
  vocabulary = tmp_path / 'text_encoder' / 'spiece.model'
  vocabulary.rename(tmp_path / 'tokenizer' / 'spiece.model')
  prompts = ['a red circle above a blue square', '', 'star ' * 100]
  oracle = transformers.T5EncoderModel.from_pretrained(
    tmp_path / 'text_encoder'
  ).eval()
  tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path / 'tokenizer')
  tokens = tokenizer(
    prompts,
    padding='max_length',
    max_length=77,
    truncation=True,
    return_tensors='pt',
  )
  with torch.no_grad():
    expected = oracle(tokens.input_ids, attention_mask=tokens.attention_mask)
  np.testing.assert_allclose(
    text.embed(prompts, tmp_path),
    expected.last_hidden_state.numpy(),
    atol=2e-5,
  )


CAPTIONS = [
  'A <b>photo</b> of a &quot;Cat&quot; at http://www.cats.com/one?x=1 !!!',
  '<person> walks | free shipping | page 12 | 10x20 cm',
  'this-is-my-cute-cat_and_dog.jpg IMG_1234.png',
  '“Quoted” — dash–dash ‘single’ ... *** #12 #123456 jc6640vc 6640vc231',
  "'whole caption in quotes'",
  'x%20y+z 192.168.0.1 12:30  ',
  '漢字 and kana カナ, ㌀ too & more &amp; more',
  '@nick says:click for more; download free J2D1A2A ends-',
  '.hidden',
  'plain words',
]


@pytest.mark.parametrize('caption', CAPTIONS)
def test_captions_are_cleaned_as_by_diffusers(caption):
  pytest.importorskip('bs4')
  pytest.importorskip('ftfy')
  pipe = object.__new__(diffusers.IFPipeline)
  expected = pipe._text_preprocessing(caption, clean_caption=True)[0]
  assert cleaning.cleaner(True)(caption) == expected


class Noises:
  """The same standard normal noise for diffusers and for this project."""

  def __init__(self, shape, order):
    self._rng = np.random.default_rng(9)
    self.shape, self.order, self.generated = shape, order, []

  def __call__(self, shape, *args, **kwargs):
    value = self._rng.normal(size=self.shape).astype(np.float32)
    self.generated.append(value)
    assert tuple(nchw(value).shape) == tuple(shape)
    return nchw(value)

  def noise(self):
    named = dict(zip(self.order, self.generated))
    steps = self.generated[len(self.order) :]
    steps.append(np.zeros_like(steps[0]))  # the last step adds no noise
    steps = jnp.asarray(np.stack(steps))
    start = jnp.asarray(named['start'])
    low = jnp.asarray(named.get('low', named['start']))
    return stage.Noise(start, low, lambda i: steps[i])


PIPELINES = {
  # name: (class, network, order of noise, steps, extra arguments)
  'text, 10 steps': ('IFPipeline', 'fast_1', ('start',), 10, {}),
  'text, 50 steps': ('IFPipeline', 'fast_1', ('start',), 50, {}),
  'image': ('IFImg2ImgPipeline', 'fast_1', ('start',), 10, {'strength': 0.7}),
  'inpainting': (
    'IFInpaintingPipeline',
    'fast_1',
    ('start',),
    10,
    {'strength': 1.0},
  ),
  'super-resolution': (
    'IFSuperResolutionPipeline',
    'fast_2',
    ('start', 'low'),
    10,
    {'noise_level': 250},
  ),
  'image, super-resolution': (
    'IFImg2ImgSuperResolutionPipeline',
    'fast_2',
    ('start', 'low'),
    10,
    {'strength': 0.8, 'noise_level': 250},
  ),
  'inpainting, super-resolution': (
    'IFInpaintingSuperResolutionPipeline',
    'fast_2',
    ('start', 'low'),
    10,
    {'strength': 0.8, 'noise_level': 0},
  ),
}


@pytest.mark.parametrize('name', PIPELINES)
def test_a_run_gives_the_images_of_diffusers_pipeline(name, monkeypatch, lent):
  kind, network, order, steps, extra = PIPELINES[name]
  cap = 1.0 if 'super' in name else 1.5
  options = SCHEDULER | {'sample_max_value': cap}
  batch, rng = 2, np.random.default_rng(3)
  uniform = lambda *s: rng.uniform(-1, 1, (batch, *s)).astype(np.float32)
  raw = tiny_if.raw_config(network)
  width = raw['encoder_hid_dim']
  text = rng.normal(size=(batch, TOKENS, width)).astype(np.float32)
  uncond = rng.normal(size=(batch, TOKENS, width)).astype(np.float32)
  image, low = uniform(SIDE, SIDE, 3), uniform(SIDE // 4, SIDE // 4, 3)
  mask = np.zeros((batch, SIDE, SIDE, 1), np.float32)
  mask[:, 4:12, 2:] = 1

  # ---- diffusers ---------------------------------------------------------
  cls = getattr(diffusers, kind)
  unet = reference(network, sample_size=SIDE)
  with torch.no_grad():
    unet.conv_out.weight *= CALM
  parts = dict(
    tokenizer=None,
    text_encoder=None,
    unet=unet,
    scheduler=diffusers.DDPMScheduler(**options),
    safety_checker=None,
    feature_extractor=None,
    watermarker=None,
    requires_safety_checker=False,
  )
  if 'super' in name:
    parts['image_noising_scheduler'] = diffusers.DDPMScheduler(
      beta_schedule='squaredcos_cap_v2'
    )
  pipe = cls(**parts)
  pipe.set_progress_bar_config(disable=True)
  noises = Noises((batch, SIDE, SIDE, 3), order)
  module = __import__(cls.__module__, fromlist=['randn_tensor'])
  monkeypatch.setattr(module, 'randn_tensor', noises)
  monkeypatch.setattr(
    diffusers.schedulers.scheduling_ddpm, 'randn_tensor', noises
  )
  asked = dict(extra)
  if 'Inpainting' in kind:
    asked |= {'mask_image': nchw(mask)}
  if 'Img2Img' in kind or 'Inpainting' in kind:
    key = 'original_image' if 'super' in name else 'image'
    asked[key] = nchw(image)
  if 'super' in name:
    asked['image'] = nchw(low)
    if kind == 'IFSuperResolutionPipeline':
      asked |= {'height': SIDE, 'width': SIDE}
  if kind == 'IFPipeline':
    asked |= {'height': SIDE, 'width': SIDE}
  expected = pipe(
    prompt_embeds=torch.from_numpy(text),
    negative_prompt_embeds=torch.from_numpy(uncond),
    guidance_scale=7.0,
    num_inference_steps=steps,
    output_type='pt',
    **asked,
  ).images
  expected = nhwc(expected)

  # ---- this --------------------------------------------------------------
  net, params = tiny_if.network(network)
  params['conv_out']['kernel'] = params['conv_out']['kernel'] * CALM
  made = schedule.Schedule(**options)
  chosen = schedule.timesteps(made, steps)
  if 'strength' in extra:
    chosen = schedule.later(chosen, extra['strength'])
  fields = {}
  if 'super' in name:
    noising = schedule.Schedule(beta_schedule='squaredcos_cap_v2')
    fields = dict(
      low_res=low, **stage.noise_terms(noising, extra['noise_level'])
    )
  if 'strength' in extra:
    fields['image'] = image
  if 'Inpainting' in kind:
    fields['inpaint_mask'] = mask
  given = stage.SampleInputs(text, uncond=uncond, guidance=7.0, **fields)
  noise = noises.noise()
  plan = schedule.plan(made, chosen)
  run = jax.jit(lambda p, g: stage.run(net, p, plan, g, noise, made))
  got = np.asarray(run(params, given))
  found = np.abs(got - expected).max()
  print(f'{name}: {found:.1e}')
  assert found < 5e-5
  if 'Inpainting' in kind:
    kept = np.broadcast_to(mask == 0, image.shape)
    np.testing.assert_array_equal(got[kept], image[kept])
