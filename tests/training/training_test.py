"""Training: resuming, the NaN guard, EMA, optimizers, the stage's loss."""

import copy
import functools
import itertools
import json
import math
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from imagen_jax.cascade import conditioning, objective, settings
from imagen_jax.data.sources import make_source
from imagen_jax.errors import DataError, NumericError, UsageError
from imagen_jax.io import lock
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.text.encoder import encode_tokens, load_text_encoder
from imagen_jax.training import loop, power_ema
from imagen_jax.training.experiment import make_experiment
from imagen_jax.training.flops import count_flops
from imagen_jax.training.guard import check_finite
from imagen_jax.training.input import eval_batches, split_index, train_batches
from imagen_jax.training.optimizer import learning_rate, matrix_axes, optimizer
from imagen_jax.training.program import train_step
from imagen_jax.training.stage_experiment import StageExperiment
from imagen_jax.training.state import ema_decay, init_state
from imagen_jax.training.step import make_train_step
from imagen_jax.training.workdir import differences
from tests import tiny_model


@pytest.fixture(scope='module')
def run(model, tmp_path_factory):
  """A finished run of six steps, and its config."""
  config = tiny_model.config()
  config.text.path = str(model / 'text')
  config.train.update(sample_every=100, ema_lengths=(0.05, 0.1), ema_every=2)
  workdir = tmp_path_factory.mktemp('run') / 'base'
  assert loop.train(config, workdir) == 6
  return config, workdir


def final_state(workdir):
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.restore_subtree('params')[0], checkpoints.latest_step()


def rows(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_run_leaves_what_the_contract_says(run):
  _, workdir = run
  assert [row['step'] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]
  assert {'step', 'loss', 'images_per_sec'} <= rows(workdir)[0].keys()
  assert json.loads((workdir / 'config.json').read_text())['format_version']
  assert (workdir / 'samples' / 'step_0000006.png').exists()


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run, tmp_path):
  config, workdir = run
  calls = iter([False, False, False, True])
  loop.train(config, tmp_path / 'w', should_stop=lambda _: next(calls))
  assert final_state(tmp_path / 'w')[1] == 4
  assert loop.train(config, tmp_path / 'w') == 6
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(tmp_path / 'w')[0],
    final_state(workdir)[0],
  )
  losses = [[row['loss'] for row in rows(w)] for w in (workdir, tmp_path / 'w')]
  assert losses[0] == losses[1]


def test_a_run_on_one_device_of_a_cpu_stays_on_it(run, tmp_path, capsys):
  config, workdir = copy.deepcopy(run[0]), tmp_path / 'w'
  config.mesh.update(data=-1, cpu='one_eigen')
  calls = iter([False, True])
  loop.train(config, workdir, should_stop=lambda _: next(calls))
  config.mesh.cpu = 'auto'
  loop.train(config, workdir, should_stop=lambda _: True)
  assert capsys.readouterr().out.count('= 1 cpu device(s)') == 2
  stored = json.loads((workdir / 'config.json').read_text())['config']
  assert stored['mesh']['cpu'] == 'one_eigen'
  np.testing.assert_allclose(
    [row['loss'] for row in rows(workdir)],
    [row['loss'] for row in rows(run[1])[:3]],
    rtol=1e-4,
  )


def test_a_killed_run_has_the_snapshots_of_an_uninterrupted_one(run, tmp_path):
  config, workdir = run

  def killed(step):
    if step == 5:
      raise KeyboardInterrupt
    return False

  with pytest.raises(KeyboardInterrupt):
    loop.train(config, tmp_path / 'w', should_stop=killed)
  assert final_state(tmp_path / 'w')[1] == 3  # and there is a snapshot of 4
  assert loop.train(config, tmp_path / 'w') == 6
  for step in (2, 4, 6):
    a, b = (
      power_ema.reconstruct(w / 'checkpoints', (0.05, 0.1), 0.1, step)[0]
      for w in (workdir, tmp_path / 'w')
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    emas, _, step = checkpoints.restore_subtree('emas')
  assert step == 6
  jax.tree.map(np.testing.assert_array_equal, emas['0.1'], a)


def test_steps_before_a_batch_that_cannot_be_read_are_saved(
  run, tmp_path, monkeypatch
):
  config, workdir = run
  read = loop.train_batches

  def damaged(experiment, start):
    for step, batch in enumerate(read(experiment, start), start + 1):
      if step == 6:
        raise DataError('photo.jpg is damaged.')
      yield batch

  monkeypatch.setattr(loop, 'train_batches', damaged)
  with pytest.raises(DataError):
    loop.train(config, tmp_path / 'w')
  assert final_state(tmp_path / 'w')[1] == 5
  losses = [[row['loss'] for row in rows(w)] for w in (workdir, tmp_path / 'w')]
  assert losses[1] == losses[0][:5]


def test_a_stop_is_saved_before_anything_else_is_done(
  run, tmp_path, monkeypatch
):
  report, saved = loop.Monitor.report, {}

  def reported(self, step, state):
    with Checkpoints(tmp_path / 'w/checkpoints') as checkpoints:
      saved[step] = checkpoints.latest_step()
    report(self, step, state)

  monkeypatch.setattr(loop.Monitor, 'report', reported)
  loop.train(run[0], tmp_path / 'w', should_stop=lambda step: step == 2)
  assert saved == {1: None, 2: 2}


def test_a_step_begins_once_the_one_two_before_has_ended(
  run, tmp_path, monkeypatch
):
  make, wait, events, results = loop.make_program, jax.block_until_ready, [], []

  def program(*args, **options):
    made = make(*args, **options)
    step = made.run

    def noted(*arrays):
      events.append(('begins', len(results) + 1))
      state, values = step(*arrays)
      results.append(values)
      return state, values

    object.__setattr__(made, 'run', noted)
    return made

  def waited(x):
    here = threading.current_thread() is threading.main_thread()
    for number, values in enumerate(results, 1):
      if here and x is values:  # not `Pace`, which waits for every step
        events.append(('ended', number))
    return wait(x)

  monkeypatch.setattr(loop, 'make_program', program)
  monkeypatch.setattr(jax, 'block_until_ready', waited)
  loop.train(run[0], tmp_path / 'w')
  for n in range(3, 7):
    assert events.index(('ended', n - 2)) < events.index(('begins', n))


def test_a_finished_run_stays_as_it_is(run):
  config, workdir = run
  before = rows(workdir)
  assert loop.train(config, workdir) == 6
  assert rows(workdir) == before


def test_a_second_training_is_refused_where_one_is_running(run, tmp_path):
  config, workdir = run
  before = rows(workdir)
  with lock.locked(workdir), pytest.raises(UsageError) as error:
    loop.train(config, workdir)
  assert error.value.key == 'workdir' and rows(workdir) == before
  config = config.copy_and_resolve_references()
  config.train.checkpoint_dir = str(workdir / 'checkpoints')
  with lock.locked(workdir / 'checkpoints'), pytest.raises(UsageError) as error:
    loop.train(config, tmp_path / 'w')
  assert error.value.key == 'config.train.checkpoint_dir'
  assert loop.train(run[0], workdir) == 6


def test_another_config_is_refused_by_key(run):
  config, workdir = run
  other = config.copy_and_resolve_references()
  other.train.optimizer.learning_rate = 0.5
  with pytest.raises(UsageError, match='train.optimizer.learning_rate'):
    loop.train(other, workdir)


def test_cadences_and_length_may_change_unless_a_decay_depends_on_it(run):
  config, _ = run
  old = {'config': json.loads(config.to_json())}
  new = json.loads(json.dumps(old))
  new['config']['train'].update(num_steps=99, log_every=5)
  assert differences(old, new) == []
  for record in (old, new):
    record['config']['train']['optimizer']['decay'] = True
  assert len(differences(old, new)) == 1


def test_sampling_a_workdir_uses_its_ema(run, model, tmp_path):
  import imagen_jax

  _, workdir = run
  shutil.copytree(workdir, tmp_path / 'base')
  shutil.copytree(model / 'text', tmp_path / 'text')
  out = imagen_jax.load(tmp_path).sample(['a red circle'])
  assert out['base'].shape == (1, 8, 8, 3)


@pytest.fixture(scope='module')
def step(model):
  """(jitted step, state, batch, text encoder's parameters)."""
  encoder = load_text_encoder(model / 'text')
  made = StageExperiment(tiny_model.config(), text=encoder)
  tx = optimizer(1e-2)
  state = init_state(tiny_model.random_params(made.stage), tx, [0.1])
  fn = make_train_step(
    made.loss, tx, seed=0, ema_limit=0.9, condition=made.condition
  )
  ids, mask, _ = encoder.tokenize(['a red circle'] * 4, max_len=12)
  image = np.full((4, 8, 8, 3), [250, 20, 20], np.uint8)
  batch = {'image': image, 'ids': ids, 'mask': mask}
  return jax.jit(fn), state, batch, encoder.params


def test_the_flops_that_short_captions_spare_are_those_of_their_encoding(model):
  encoder = load_text_encoder(model / 'text')
  config = tiny_model.config()
  config.text.max_len, config.train.batch_size = 40, 4
  made = StageExperiment(config, text=encoder)

  def flops(function, *tokens):
    return count_flops(jax.make_jaxpr(function)(encoder.params, *tokens))

  def condition(text, **batch):
    return made.condition(jax.random.key(0), batch, text)['text']

  batch = made.batch_spec(4)
  whole = flops(lambda text, batch: condition(text, **batch), batch)
  for spared, size in zip(made.spared_flops, (16, 32, 40), strict=True):
    tokens = [
      jax.ShapeDtypeStruct((4, size), kind) for kind in (jnp.int32, bool)
    ]
    alone = flops(functools.partial(encode_tokens, encoder.module), *tokens)
    assert whole - spared == pytest.approx(alone, rel=0.02)
  cached = StageExperiment(config, text=encoder, cached_text=True)
  assert not cached.spared_flops


def test_loss_falls_on_one_repeated_batch(step):
  fn, state, batch, text = step
  losses = []
  for _ in range(40):
    state, metrics = fn(state, batch, text)
    losses.append(float(metrics['loss']))
  assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:10])


def test_a_step_with_nan_changes_nothing_but_the_counters(step):
  fn, state, batch, text = step
  bad = jax.tree.map(lambda x: x * np.nan, text)
  after, metrics = fn(state, batch, bad)
  assert (int(after.step), int(after.skipped_in_row)) == (1, 1)
  assert int(metrics['skipped']) == 1
  for name in ('params', 'ema_params', 'opt_state'):
    jax.tree.map(
      np.testing.assert_array_equal,
      getattr(after, name),
      getattr(state, name),
    )
  # The unchanged parameters count once more, so the profile stays exact.
  jax.tree.map(np.testing.assert_array_equal, after.emas['0.1'], state.params)
  healed, _ = fn(after, batch, text)
  assert (int(healed.skipped), int(healed.skipped_in_row)) == (1, 0)


def test_many_bad_steps_in_a_row_end_the_run_and_name_their_images(
  step, tmp_path
):
  _, state, *_ = step
  state = state.replace(skipped_in_row=jnp.asarray(2))
  source = make_source(kind='shapes', size=16)
  seen = [(6, np.asarray([3, 1])), (7, np.asarray([8, 2]))]
  check_finite(state, 7, 3, seen, source, tmp_path)
  with pytest.raises(NumericError, match='step 7.* scene 8.* scene 2'):
    check_finite(state, 7, 2, seen, source, tmp_path)
  lines = (tmp_path / 'bad_batches_0.jsonl').read_text().splitlines()
  assert json.loads(lines[0]) == {'step': 6, 'samples': ['scene 3', 'scene 1']}


def test_ema_warms_up():
  assert float(ema_decay(jnp.asarray(0), 0.999)) == pytest.approx(0.1)
  assert float(ema_decay(jnp.asarray(90), 0.999)) == pytest.approx(0.91)
  assert float(ema_decay(jnp.asarray(10**6), 0.999)) == pytest.approx(0.999)


def test_learning_rate_ends_at_zero_not_at_the_papers_misprint():
  rate = learning_rate(peak=1e-4, warmup=100, decay_steps=1000)
  assert float(rate(100)) == pytest.approx(1e-4)
  assert float(rate(1000)) == pytest.approx(0, abs=1e-9)
  held = learning_rate(peak=1e-4, warmup=100)
  assert float(held(10**6)) == pytest.approx(1e-4)
  trial = learning_rate(peak=1e-4, warmup=100, decay_steps=20)
  assert float(trial(2)) == pytest.approx(1e-4)


def test_adafactor_moves_zero_layers_without_parameter_scale():
  zero = {'w': jnp.zeros((4, 4))}
  grads = {'w': jnp.ones((4, 4))}
  moves = []
  for scale in (True, False):
    tx = optimizer(
      1e-2, kind='adafactor', clip=None, multiply_by_parameter_scale=scale
    )
    updates, _ = tx.update(grads, tx.init(zero), zero)
    moves.append(float(jnp.abs(updates['w']).max()))
  assert moves[0] < 1e-4 and moves[1] > 5e-3


@pytest.mark.parametrize('name', ['base', 'sr1'])
def test_muon_orthogonalises_each_kernel_as_the_matrix_it_is(model, name):
  encoder = load_text_encoder(model / 'text')
  config = tiny_model.config(name)
  if name == 'base':
    # Few distinct shapes, of which each is compiled.
    config.stage.net = tiny_model.UNET | {'channel_mults': (1, 1)}
  params = tiny_model.random_params(tiny_model.build(config, encoder))
  kernels, chosen = 0, {}
  for path, value in flatten_dict(params).items():
    axes = matrix_axes(tuple(map(jax.tree_util.DictKey, path)), value)
    inside = path[-1] == 'kernel' and 'conv_' not in path[0]
    assert (axes is not None) == inside, path
    if axes is not None:
      kernels += 1
      chosen[axes, value.ndim] = path, value  # one of each kind
  assert kernels > 20
  chosen = dict(chosen.values())
  tx = optimizer(1.0, kind='muon', clip=None)
  nested = unflatten_dict(chosen)
  updates, _ = tx.update(nested, tx.init(nested), nested)
  for path, update in flatten_dict(updates).items():
    axes = matrix_axes(tuple(map(jax.tree_util.DictKey, path)), update)
    together = (*axes.reduction_axis, *axes.output_axis)
    batch = [i for i in range(update.ndim) if i not in together]
    matrices = np.transpose(update, (*batch, *together))
    rows = np.prod([update.shape[i] for i in axes.reduction_axis])
    matrices = matrices.reshape(*(update.shape[i] for i in batch), rows, -1)
    sizes = np.linalg.svd(matrices, compute_uv=False)
    assert sizes.max() < 2 * sizes.min(), path
    np.testing.assert_allclose(np.sqrt(np.mean(update**2)), 0.2, rtol=0.3)


@pytest.mark.parametrize(
  'options, named',
  [
    ({'kind': 'sgdd'}, 'sgdd'),
    ({'b3': 0.9}, 'b3'),
    ({'kind': 'muon', 'ns_coeffs': (1, 2)}, r'ns_coeffs has the shape \(2,\)'),
    ({'kind': 'muon', 'ns_coeffs': 'soon'}, 'soon'),
  ],
)
def test_an_unknown_optimizer_or_option_is_refused(options, named):
  with pytest.raises(UsageError, match=named):
    optimizer(1e-3, **options)


@pytest.mark.parametrize(
  'dtype, gradient', [('bfloat16', 'half'), ('float32', 'bfloat16')]
)
def test_gradients_have_float32_or_the_type_of_the_activations(dtype, gradient):
  config = tiny_model.config(gradient_dtype=gradient)
  config.dtype = dtype
  experiment = types.SimpleNamespace(config=config, loss=None, condition=None)
  with pytest.raises(UsageError) as caught:
    train_step(experiment, optax.identity())
  assert caught.value.key == 'config.train.gradient_dtype'


def test_adafactor_factors_the_kernels_of_attentions():
  """Their second moments are two vectors, as of a [features, heads·size]."""
  shapes = {
    'attn': {
      'key': {'kernel': (256, 4, 64)},
      'out': {'kernel': (4, 64, 256)},
    },
    'res': {'conv1': {'kernel': (3, 3, 128, 256)}},
  }
  params = jax.tree.map(
    lambda shape: jnp.ones(shape), shapes, is_leaf=lambda s: type(s) is tuple
  )
  tx = optimizer(1e-3, kind='adafactor')
  state = jax.eval_shape(tx.init, params)
  numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
  assert numbers < 2 * (256 + 256) + 9 * (128 + 256) + 20
  updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
  assert jax.tree.map(jnp.shape, updates) == shapes


@pytest.mark.parametrize('split', ['train', 'eval'])
def test_crops_of_both_images_show_the_same_place(model, split):
  encoder = load_text_encoder(model / 'text')
  config = tiny_model.config('sr1')
  config.stage.crop, config.data.flip = 8, False
  made = StageExperiment(config, text=encoder, cached_text=False)
  cut = made.augmentation(split)
  whole = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  low = conditioning.box_downsample(whole[None].astype(np.float32), 8)[0]
  places = set()
  for i in range(60):
    part = cut({'image': whole}, np.random.default_rng(i))['image']
    assert part.shape == made.batch_spec(1)['image'].shape[1:] == (8, 8, 3)
    mine = conditioning.box_downsample(part[None].astype(np.float32), 4)[0]
    places |= {
      (y, x)
      for y, x in itertools.product(range(5), repeat=2)
      if (low[y : y + 4, x : x + 4] == mine).all()
      and (whole[2 * y : 2 * y + 8, 2 * x : 2 * x + 8] == part).all()
    }
  assert len(places) > 15  # of 25


def test_only_crops_go_to_the_devices(model):
  config = tiny_model.config('sr1')
  config.stage.crop = 8
  config.text.path = str(model / 'text')
  made = make_experiment(config)
  for batches in train_batches(made, 0), eval_batches(made):
    batch, _ = split_index(next(batches))
    spec = made.batch_spec(config.train.batch_size)
    assert jax.tree.map(jax.typeof, batch) == jax.tree.map(jax.typeof, spec)


@pytest.mark.slow
def test_worker_processes_make_a_runs_batches(model):
  config = tiny_model.config('sr1')
  config.stage.crop, config.data.flip = 8, True
  config.text.path = str(model / 'text')
  here = train_batches(make_experiment(config), 1)
  config.data.workers = 2
  there = train_batches(make_experiment(config), 1)
  for _ in range(3):
    assert jax.tree.all(jax.tree.map(np.array_equal, next(here), next(there)))


def test_low_resolution_noise_is_added_before_upsampling(model):
  encoder = load_text_encoder(model / 'text')
  made = tiny_model.build(tiny_model.config('sr1'), encoder)
  low = jnp.zeros((1, 8, 8, 3))
  eps = jax.random.normal(jax.random.key(0), low.shape)
  out = conditioning.low_res_input(made, eps, low, jnp.asarray([1.0]))
  np.testing.assert_allclose(out, conditioning.upsample(eps, 2), atol=1e-6)
  clean = conditioning.low_res_input(made, eps, low + 0.5, jnp.asarray([0.0]))
  np.testing.assert_allclose(clean, 0.5, atol=1e-6)


def test_levels_reach_max_level_and_no_further(model):
  encoder = load_text_encoder(model / 'text')
  config = tiny_model.config('sr1')
  config.stage.max_level = 0.25
  made, seen = tiny_model.build(config, encoder), []

  class Spy:
    def apply(self, variables, z, logsnr, text, mask, low, level, **_):
      seen.append(level)
      return jnp.zeros_like(z)

  objective.loss(
    tiny_model.with_network(made, Spy()),
    {},
    jax.random.key(0),
    np.zeros((256, 16, 16, 3), np.uint8),
    jnp.zeros((256, 5, made.text_dim)),
    jnp.ones((256, 5), bool),
  )
  assert 0.24 < seen[0].max() < 0.25 and seen[0].min() < 0.01
  with pytest.raises(UsageError) as caught:
    settings.choose([made], {'aug_level': 0.3})
  assert caught.value.key == 'aug_level'
  config.stage.max_level = 1.5
  with pytest.raises(UsageError, match='max_level'):
    tiny_model.build(config, encoder)


def test_pixels_are_weighed_by_the_contrast_of_the_small_image():
  low = np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 3))
  low[1, :, :4] = 0.3  # the 3×3 neighbourhoods are flat up to column 2
  weight = np.asarray(objective.contrast_weight(jnp.asarray(low), 0.05, 12))
  assert weight.shape == (2, 12, 12, 1)
  padded = np.pad(low, ((0, 0), (1, 1), (1, 1), (0, 0)), 'edge')
  for b, i, j in np.ndindex(2, 6, 6):
    contrast = padded[b, i : i + 3, j : j + 3].var(axis=(0, 1)).mean()
    expected = 0.05 / (0.05 + contrast)
    square = weight[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
    np.testing.assert_allclose(square, expected, rtol=1e-5)
  np.testing.assert_allclose(weight[1, :, :6], 1)
  assert weight[1, :, 6:].max() < 0.9


def test_a_contrast_floor_makes_a_faint_thing_count(model):
  encoder = load_text_encoder(model / 'text')
  config = tiny_model.config('sr1')
  config.stage.prediction = 'x'
  grey, pale, black = (np.full((16, 16, 3), v, np.uint8) for v in (200, 220, 0))
  squares = np.stack([grey, grey])
  squares[0, 6:10, 6:10], squares[1, 6:10, 6:10] = pale[0, 0], black[0, 0]

  class Flat:  # predicts neither square
    def apply(self, variables, z, *_, **__):
      return jnp.full_like(z, 200 / 127.5 - 1)

  def losses(floor):
    config.stage.contrast_floor = floor
    return objective.loss(
      tiny_model.with_network(tiny_model.build(config, encoder), Flat()),
      {},
      jax.random.key(0),
      squares,
      jnp.zeros((2, 5, 128)),
      jnp.ones((2, 5), bool),
    )[0]

  plain, weighed = losses(None), losses(1e-4)
  assert plain[1] > 99 * plain[0]  # (200 / 20)²
  assert weighed[1] < 3 * weighed[0]
  assert weighed[0] < plain[0]
  squares = squares[:, 4:12, 4:12]  # a crop
  assert (losses(1e-4) < losses(None)).all()


@pytest.mark.parametrize('stage, floor', [('sr1', 0.0), ('base', 0.1)])
def test_a_contrast_floor_without_effect_is_refused(model, stage, floor):
  config = tiny_model.config(stage)
  config.stage.contrast_floor = floor
  with pytest.raises(UsageError, match='stage.contrast_floor'):
    tiny_model.build(config, load_text_encoder(model / 'text'))


def test_training_and_sampling_have_one_null_condition(model):
  text = jax.random.normal(jax.random.key(0), (2, 5, 4))
  mask = jnp.asarray([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], bool)
  null_text, null_mask = conditioning.null_where(
    jnp.asarray([True, True]), text, mask
  )
  assert not null_text.any() and not null_mask.any()
  kept = conditioning.null_where(jnp.asarray([False, True]), text, mask)
  np.testing.assert_array_equal(kept[0][0], text[0])
  np.testing.assert_array_equal(kept[1][0], mask[0])


def test_times_are_stratified_over_all_parts_of_a_batch(model):
  """Eight parts of one image have the times of one batch of eight."""
  seen = {}
  for parts in (1, 8):
    config = tiny_model.config(accumulate=parts)
    config.stage.stratified = True
    made = StageExperiment(config, text=load_text_encoder(model / 'text'))
    times = seen[parts] = []

    def loss(params, key, batch, frozen, times=times):
      jax.debug.callback(times.extend, batch['t'])
      return params['w'] * batch['t'], {}

    batch = {
      'image': np.zeros((8, 8, 8, 3), np.uint8),
      'text': np.zeros((8, 12, made.text.dim), np.float32),
      'mask': np.ones((8, 12), bool),
    }
    tx = optax.sgd(1.0)
    step = make_train_step(
      loss,
      tx,
      seed=0,
      ema_limit=0.9,
      condition=made.condition,
      accumulate=parts,
    )
    jax.jit(step)(init_state({'w': jnp.ones(())}, tx), batch, {})
    jax.effects_barrier()
  whole, apart = np.sort(np.array([seen[1], seen[8]], np.float32))
  np.testing.assert_allclose(np.diff(apart), 1 / 8, rtol=1e-4)
  np.testing.assert_array_equal(apart, whole)


@pytest.mark.parametrize('guidance', [2.0, float('nan')])
def test_a_preview_that_could_not_be_sampled_is_refused_at_once(
  model, guidance
):
  config = tiny_model.config()
  config.stage.cond_drop = 0.0
  config.stage.sampling.guidance = guidance
  with pytest.raises(UsageError) as caught:
    StageExperiment(config, text=load_text_encoder(model / 'text'))
  assert caught.value.key == 'config.stage.sampling.guidance'


@pytest.mark.parametrize('unroll', [True, False])
def test_accumulating_averages_the_gradients_of_the_parts(unroll):
  def loss_fn(params, key, batch, frozen):
    x, y = batch['x'], batch['y']
    t = jax.random.uniform(key, y.shape)
    return (x @ params['w'] - t * y) ** 2, {'t': t}

  tx = optax.sgd(1.0)  # linear in the gradient
  state = init_state({'w': jnp.arange(3.0)}, tx)
  x = jax.random.normal(jax.random.key(1), (8, 3))
  y = jax.random.normal(jax.random.key(2), (8,))
  batch = {'x': x, 'y': y}
  make = functools.partial(
    make_train_step, loss_fn, tx, seed=0, ema_limit=0.9, unroll=unroll
  )
  after, metrics = jax.jit(make(accumulate=4))(state, batch, {})

  def part(params, i):
    # Row r belongs to part r % 4; each part has its own key.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), i)
    rows = {name: array[i::4] for name, array in batch.items()}
    return jnp.mean(loss_fn(params, key, rows, {})[0])

  losses, grads = zip(
    *(jax.value_and_grad(part)(state.params, i) for i in range(4))
  )
  mean = sum(g['w'] for g in grads) / 4
  np.testing.assert_allclose(
    after.params['w'], state.params['w'] - mean, rtol=1e-5
  )
  np.testing.assert_allclose(metrics['loss'], sum(losses) / 4, rtol=1e-5)
  # Sums and counts of the noise bands are averaged over the parts as well.
  np.testing.assert_allclose(metrics['band_count'].sum(), 2)
  once, _ = jax.jit(make())(state, batch, {})
  assert not np.allclose(once.params['w'], after.params['w'])
