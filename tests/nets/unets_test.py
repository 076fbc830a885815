"""The U-Nets: masked text, shapes, scans, norms, sizes."""

import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.nets import attention as attention_module
from imagen_jax.nets.attention import TextAttention, TextPool
from imagen_jax.nets.efficient_unet import EfficientUNet
from imagen_jax.nets.norm import GroupNorm, LayerNorm
from imagen_jax.nets.unet import UNet

BASE = UNet(
  resolution=8,
  channels=16,
  channel_mults=(1, 2),
  num_res_blocks=1,
  attention_resolutions=(4,),
  head_dim=8,
  norm_groups=4,
)
# Cross-attention to the text alone, as in the 256→1024 model.
CROSS = EfficientUNet(
  channels=(8, 16),
  num_res_blocks=(1, 2),
  strides=(2, 2),
  self_attention=(False, False),
  text_attention=(False, True),
  num_heads=2,
  emb_channels=16,
  norm_groups=4,
)
FUSED = CROSS.clone(self_attention=(False, True))
NETS = {'base': BASE, 'cross': CROSS, 'fused': FUSED}


def inputs(net, size=8, seed=0):
  rng = np.random.default_rng(seed)
  z = jnp.asarray(rng.normal(size=(2, size, size, 3)), jnp.float32)
  logsnr = jnp.asarray([-1.0, 2.0])
  text = jnp.asarray(rng.normal(size=(2, 6, 12)), jnp.float32)
  mask = jnp.asarray([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
  extra = () if isinstance(net, UNet) else (z[::-1], jnp.asarray([0.1, 0.7]))
  return z, logsnr, text, mask, *extra


def random_like(shapes, spread=0.2):
  """Random parameters of these shapes, scales around 1.

  From NumPy: compiling an initialiser takes longer than a whole test.
  """
  rng = np.random.default_rng(1)

  def leaf(path, shape):
    values = spread * rng.normal(size=shape.shape).astype(np.float32)
    return values + (path[-1].key == 'scale')

  return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def params(name):
  net = NETS[name]
  shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs(net))
  return random_like(shapes['params'])


@functools.cache
def compiled(name):
  return jax.jit(NETS[name].apply)


def apply(name):
  return functools.partial(compiled(name), {'params': params(name)})


@pytest.mark.parametrize('name', NETS)
def test_masked_text_contributes_exactly_nothing(name):
  z, logsnr, text, mask, *extra = inputs(NETS[name])
  other = jnp.where(mask[..., None], text, 1e3 * jnp.cos(text))
  a = apply(name)(z, logsnr, text, mask, *extra)
  b = apply(name)(z, logsnr, other, mask, *extra)
  np.testing.assert_array_equal(a, b)
  shown = apply(name)(z, logsnr, text[..., ::-1], mask, *extra)
  assert np.abs(a - shown).max() > 1e-3  # visible text matters


@pytest.mark.parametrize('name', NETS)
def test_fully_masked_text_leaks_neither_words_nor_length(name):
  z, logsnr, text, mask, *extra = inputs(NETS[name])
  nothing = jnp.zeros_like(mask)
  a = apply(name)(z, logsnr, text, nothing, *extra)
  b = apply(name)(z, logsnr, jnp.zeros_like(text), nothing, *extra)
  np.testing.assert_array_equal(a, b)
  assert np.isfinite(a).all()


@pytest.mark.parametrize('name', ['base', 'fused'])
def test_a_new_network_predicts_zeros(name):
  net = NETS[name]
  init = lambda: net.init(jax.random.key(0), *inputs(net))['params']['conv_out']
  fresh = params(name) | {'conv_out': jax.jit(init)()}
  assert not np.any(compiled(name)({'params': fresh}, *inputs(net)))


@pytest.mark.parametrize('name', NETS)
def test_noise_level_matters(name):
  z, logsnr, *rest = inputs(NETS[name])
  a = apply(name)(z, logsnr, *rest)
  assert np.abs(a - apply(name)(z, logsnr + 3, *rest)).max() > 1e-3


def test_augmentation_level_matters():
  *rest, level = inputs(CROSS)
  a = apply('cross')(*rest, level)
  assert np.abs(a - apply('cross')(*rest, 1 - level)).max() > 1e-3


def test_without_self_attention_crops_and_whole_images_run_alike():
  whole = apply('cross')(*inputs(CROSS, 32))
  assert whole.shape == (2, 32, 32, 3)
  assert apply('cross')(*inputs(CROSS, 8)).shape == (2, 8, 8, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
  'change',
  [{'unroll': False}, {'remat': 'nothing_saveable'}],
  ids=['rolled', 'remat'],
)
def test_scan_and_remat_change_no_gradient(change):
  args = inputs(FUSED)

  def grad(net):
    f = lambda p: jnp.sum(net.apply({'params': p}, *args, train=True) ** 2)
    found = jax.jit(jax.grad(f))(params('fused'))
    # A softmax does not change with the bias of its keys: rounding only.
    rest = found['conditioning']['text_pool']['key'].pop('bias')
    assert np.abs(rest).max() < 1e-5
    return found

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-6
    ),
    grad(FUSED.clone(**change)),
    grad(FUSED.clone(unroll=True)),
  )


def test_the_pixels_of_a_block_are_told_apart():
  """An input that repeats a 2×2 tile gives more than its mean, inside."""
  net = EfficientUNet(
    channels=(8,),
    num_res_blocks=(1,),
    strides=(2,),
    self_attention=(False,),
    text_attention=(False,),
    emb_channels=8,
    norm_groups=2,
  )
  z, logsnr, text, mask, low_res, level = inputs(net, 2)
  tiled = lambda x: jnp.tile(x, (1, 20, 20, 1))
  args = tiled(z), logsnr, text, mask, tiled(low_res), level
  shapes = jax.eval_shape(net.init, jax.random.key(0), *args)
  middle = jax.jit(net.apply)(random_like(shapes), *args)[:, 18:20, 18:20]
  assert np.ptp(middle, axis=(1, 2)).min() > 0.1


def test_blocks_of_a_run_are_stacked():
  kernel = params('fused')['down_1']['res']['conv1']['kernel']
  assert kernel.shape == (2, 3, 3, 16, 16)


def test_residual_sums_are_divided_by_sqrt_2():
  """Blocks whose residual branches are zero scale their input by 1/√2.

  The input is so small that epsilon dominates the last norm, which therefore
  preserves the scale.
  """

  def seen(blocks):
    net = EfficientUNet(
      channels=(4,),
      num_res_blocks=(blocks,),
      strides=(1,),
      self_attention=(False,),
      text_attention=(False,),
      emb_channels=4,
      norm_groups=2,
    )
    z, *rest = inputs(net)
    args = (1e-6 * z, *rest)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *args)['params']
    p = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    p['conv_in']['kernel'][1, 1, :3, :3] = np.eye(3)
    # In the decoder the shortcut passes the block's input, not the skip.
    p['up_0']['res']['shortcut']['kernel'][:, 0, 0, :4, :] = np.eye(4)
    p['join']['kernel'][0, 0, :4] = np.eye(4)
    p['norm_out']['scale'][:] = 1
    last = lambda module, _: module.name == 'norm_out'
    apply = functools.partial(net.apply, capture_intermediates=last)
    _, state = jax.jit(apply)({'params': p}, *args)
    return state['intermediates']['norm_out']['__call__'][0]

  np.testing.assert_allclose(seen(3), seen(1) / 4, rtol=1e-3, atol=1e-7)


def test_bfloat16_is_close_to_float32():
  args = inputs(FUSED)
  half = jax.jit(FUSED.clone(dtype=jnp.bfloat16).apply)(
    {'params': params('fused')}, *args
  )
  full = apply('fused')(*args)
  assert half.dtype == jnp.float32
  assert np.abs(half - full).mean() < 0.05 * np.abs(full).mean()


def test_group_norm_is_flax_group_norm():
  x = jax.random.normal(jax.random.key(0), (2, 4, 5, 12)) * 3 + 1
  own, theirs = GroupNorm(4), nn.GroupNorm(4)
  p = {'scale': jnp.arange(12.0), 'bias': jnp.cos(jnp.arange(12.0))}
  np.testing.assert_allclose(
    jax.jit(own.apply)({'params': p}, x),
    jax.jit(theirs.apply)({'params': p}, x),
    atol=2e-5,
  )


@pytest.mark.parametrize('norm', [GroupNorm(4), LayerNorm()])
def test_a_norm_is_exact_far_from_zero(norm):
  """Against float64, where the mean is a thousand standard deviations."""
  rng = np.random.default_rng(0)
  x = (1000 + rng.normal(size=(2, 64, 64, 12))).astype(np.float32)
  shapes = jax.eval_shape(norm.init, jax.random.key(0), x)
  p = jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes)
  p['params']['bias'][:] = 0
  split = x.reshape(2, 64, 64, 4, 3) if isinstance(norm, GroupNorm) else x
  axes = (1, 2, 4) if isinstance(norm, GroupNorm) else 3
  exact = split - split.mean(axes, np.float64, keepdims=True)
  exact /= np.sqrt(np.mean(exact**2, axes, keepdims=True) + 1e-6)
  got = jax.jit(norm.apply)(p, x)
  np.testing.assert_allclose(got, exact.reshape(x.shape), atol=5e-4)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_qk_norm_bounds_the_logits_in_bfloat16(qk_norm):
  """By √size, also with kernels a thousand times as large."""
  layer = TextAttention(8, qk_norm=qk_norm, norm_groups=4, dtype=jnp.bfloat16)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 4, 4, 16)), jnp.float32)
  text = jnp.asarray(rng.normal(size=(2, 6, 12)), jnp.float32)
  mask = jnp.ones((2, 6), bool)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x, text, mask)
  params = random_like(shapes['params'])
  names = ['query_norm', 'key_norm', 'text_key_norm']
  assert [name in params for name in names] == [qk_norm] * 3
  for name in ('query', 'key', 'text_key'):
    params[name]['kernel'] = 1e3 * params[name]['kernel']
    if qk_norm:
      params[f'{name}_norm']['scale'] = np.ones(8)
  seen = []

  def spy(q, k, v, mask, *, implementation):
    seen.append(jnp.einsum('btnh,bsnh->bnts', q, k) / np.sqrt(8))
    return v[:, : q.shape[1]]

  with mock.patch.object(attention_module, 'attention', spy):
    layer.apply({'params': params}, x, text, mask)
  largest = np.abs(seen[0].astype(jnp.float32)).max()
  assert (largest <= 1.02 * np.sqrt(8)) == qk_norm


@pytest.mark.parametrize('name', ['base', 'fused'])
def test_qk_norm_is_an_option_of_both_networks(name):
  net = NETS[name]
  shapes = jax.eval_shape(
    net.clone(qk_norm=True).init, jax.random.key(0), *inputs(net)
  )
  more = jax.tree.leaves(shapes['params'])
  attentions = sum('attn' in layer for layer in params(name))
  assert len(more) == len(jax.tree.leaves(params(name))) + 3 * attentions


def test_pooled_text_of_the_null_condition_is_zero():
  pool = TextPool(16, head_dim=4)
  text = jax.random.normal(jax.random.key(0), (2, 5, 8))
  mask = jnp.asarray([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
  shapes = jax.eval_shape(pool.init, jax.random.key(1), text, mask)
  out = jax.jit(pool.apply)(random_like(shapes), text, mask)
  assert not np.any(out[1]) and np.abs(out[0]).max() > 0.1


@pytest.mark.parametrize(
  'net,size,low,least,most',
  [
    (UNet(), 64, False, 2.0e9, 2.45e9),
    (EfficientUNet(), 256, True, 570e6, 665e6),
  ],
)
def test_the_defaults_have_the_papers_sizes(net, size, low, least, most):
  """2 B and 600 M parameters (Section 4.1), from abstract shapes."""
  z, level = jnp.zeros((1, size, size, 3)), jnp.zeros((1,))
  text, mask = jnp.zeros((1, 128, 4096)), jnp.ones((1, 128), bool)
  extra = (z, level) if low else ()
  shapes = jax.eval_shape(
    net.init, jax.random.key(0), z, level, text, mask, *extra
  )
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert least < count < most


@pytest.mark.slow
@pytest.mark.parametrize('name', ['base', 'fused'])
def test_no_gradient_is_summed_in_bfloat16(name):
  """No parameter's, of a network whose activations are: it would be rounded."""
  net = NETS[name].clone(dtype=jnp.bfloat16)
  mesh = sharding.make_mesh()
  rows = sharding.put_whole_batch(
    [np.repeat(x, 4, axis=0) for x in inputs(net)], mesh
  )
  loss = lambda p: jnp.sum(jnp.sin(net.apply({'params': p}, *rows)))
  exact = {'xla_allow_excess_precision': False}
  with jax.set_mesh(mesh):
    grads = jax.jit(jax.grad(loss), compiler_options=exact)(params(name))
  rounded = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    if np.array_equal(leaf, leaf.astype(jnp.bfloat16))
  ]
  # A bias that all keys have changes no softmax, so it has no gradient.
  assert rounded in ([], ["['conditioning']['text_pool']['key']['bias']"])
