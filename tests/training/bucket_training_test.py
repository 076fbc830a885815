"""Training in a bucket: saved, resumed, kept, read again."""

import json
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import imagen_jax
from imagen_jax.cli import evaluate, watch
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import bucket as buckets
from imagen_jax.io import files, manifest
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.io.local_tier import LocalTier
from imagen_jax.training import loop, workdir
from imagen_jax.training.experiment import Export
from imagen_jax.training.export import export_stage
from tests import tiny_model


@pytest.fixture(scope='module')
def config(model):
  config = tiny_model.config(sample_every=6, profile_at=4)
  config.text.path = str(model / 'text')
  return config


@pytest.fixture(scope='module')
def local(config, tmp_path_factory):
  """The same run in a local folder."""
  workdir = tmp_path_factory.mktemp('local') / 'base'
  loop.train(config, workdir)
  return workdir


@pytest.fixture(scope='module')
def remote(bucket, config):
  """A workdir in a bucket; the run was interrupted at step 4 and resumed."""
  workdir = f'{bucket.url}/training/base'
  assert loop.train(config, workdir, should_stop=lambda step: step == 4) == 4
  assert loop.train(config, workdir) == 6
  return workdir


def state(workdir):
  with Checkpoints(f'{workdir}/checkpoints') as checkpoints:
    return checkpoints.restore_subtree('ema_params')[0]


def losses(path):
  return [row['loss'] for row in files.read_lines(path)]


def test_a_run_in_a_bucket_is_the_local_one_to_the_bit(local, remote):
  jax.tree.map(np.testing.assert_array_equal, state(remote), state(local))
  metrics = buckets.at(remote) / 'metrics.jsonl'
  assert losses(metrics) == losses(local / 'metrics.jsonl')


def test_a_workdir_in_a_bucket_holds_what_a_local_one_does(local, remote):
  ours, theirs = (
    {name.split('/')[0] for name in files.tree(folder)}
    for folder in (remote, local)
  )
  assert ours == theirs
  assert {'config.json', 'metrics.jsonl', 'samples', 'profile'} <= ours
  assert files.tree(remote)['samples/step_0000006.png'] > 0


def test_the_model_is_read_from_the_bucket(local, remote, tmp_path):
  images = [
    imagen_jax.load(str(path)).sample(['a'])['base'] for path in (local, remote)
  ]
  np.testing.assert_array_equal(*images)
  out = tmp_path / 'model' / 'base'
  export_stage(Export(workdir=buckets.at(remote), out=out))
  assert (out / 'stage.json').exists()
  record = json.loads((out / 'stage.json').read_text())
  assert record['provenance']['training_seconds'] is not None


def test_a_run_in_a_bucket_is_watched_and_followed(remote, tmp_path, capsys):
  assert watch.main(['--once', remote]) == 0
  line = capsys.readouterr().out.splitlines()[-1].split()
  assert line[:2] == [remote, '6/6'] and line[-2:] == ['6', 'finished']
  asked = ['--suite', 'shapes', '--follow', remote]
  assert evaluate.main(asked) == 2  # the report would go there
  few = ['--categories', 'single', '--num', '1', '--steps', '1']
  assert evaluate.main([*asked, *few, '--out', str(tmp_path)]) == 0
  steps = [r['step'] for r in files.read_lines(tmp_path / 'scores.jsonl')]
  assert steps == [6, 4]  # the newest first


def test_checkpoints_alone_may_be_in_a_bucket(bucket, config, local, tmp_path):
  config = config.copy_and_resolve_references()
  config.train.update(sample_every=None, profile_at=None)
  config.train.checkpoint_dir = f'{bucket.url}/elsewhere'
  loop.train(config, tmp_path / 'w')
  found = [name.split('/')[0] for name in files.tree(f'{bucket.url}/elsewhere')]
  assert sorted(set(found)) == ['3', '6']
  assert not (tmp_path / 'w/checkpoints').exists()


# ---- Damage ----------------------------------------------------------------
@pytest.fixture(scope='module')
def steps(bucket):
  """Checkpoints of steps 1 to 3 of which two are kept."""
  where = f'{bucket.url}/steps'
  tree = {'a': jnp.arange(3000.0), 'b': jnp.ones((3, 4))}
  with Checkpoints(where, keep_last=2) as checkpoints:
    for step in 1, 2, 3:
      checkpoints.save(step, tree, {'data_step': step})
    checkpoints.wait()
    assert checkpoints.steps() == checkpoints.all_steps() == [2, 3]
  return where, tree


def test_any_changed_object_is_noticed_and_named(bucket, steps):
  where, tree = steps
  generator = random.Random(0)
  objects = list(files.tree(f'{where}/3'))
  with Checkpoints(where) as checkpoints:
    for name in objects:
      path = buckets.at(where) / '3' / name
      whole = path.read_bytes()
      raw, bit = bytearray(whole or b'?'), generator.randrange(8)
      raw[generator.randrange(len(raw))] ^= 1 << bit
      path.write_bytes(bytes(raw))
      with pytest.raises(manifest.Damaged, match=path.name):
        checkpoints.verify(3)
      _, extra, step = checkpoints.restore(jax.eval_shape(lambda: tree))
      assert (step, extra) == (2, {'data_step': 2})
      path.write_bytes(whole)
      checkpoints._bad.clear()
    checkpoints.verify(3)


def test_an_error_of_the_bucket_does_not_pass_for_a_missing_step(
  steps, monkeypatch
):
  where, _ = steps

  def fails(self):
    raise OSError('Forbidden')

  with Checkpoints(where) as checkpoints:
    monkeypatch.setattr(type(checkpoints.directory), 'stat', fails)
    with pytest.raises(OSError):
      checkpoints.all_steps()


# ---- Nothing whole ---------------------------------------------------------
@pytest.mark.parametrize('force', [False, True])
def test_a_run_whose_checkpoints_lost_their_manifests_is_not_begun_anew(
  config, tmp_path, force
):
  config = config.copy_and_resolve_references()
  config.train.update(sample_every=None, profile_at=None)
  loop.train(config, tmp_path / 'w')
  for step in '3', '6':
    (tmp_path / 'w/checkpoints' / step / manifest.NAME).unlink()
  if force:
    assert loop.train(config, tmp_path / 'w', force=True) == 6
    return
  with pytest.raises(ModelError, match='3, 6'):
    loop.train(config, tmp_path / 'w')


def test_a_first_save_that_was_cut_short_is_made_again(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.train.update(sample_every=None, profile_at=None)
  (tmp_path / 'w/checkpoints/3/state').mkdir(parents=True)
  assert loop.train(config, tmp_path / 'w') == 6


# ---- On the host's own disk ------------------------------------------------
def test_a_killed_run_goes_on_from_the_hosts_own_disk(
  config, local, tmp_path, monkeypatch, capsys
):
  config = config.copy_and_resolve_references()
  config.train.update(sample_every=None, profile_at=None)
  config.train.local_checkpoint_every = 1
  config.train.local_checkpoint_dir = str(tmp_path / 'ram')

  def killed(step):
    if step == 5:
      raise KeyboardInterrupt
    return False

  with pytest.raises(KeyboardInterrupt):
    loop.train(config, tmp_path / 'w', should_stop=killed)
  with Checkpoints(tmp_path / 'w/checkpoints') as checkpoints:
    assert checkpoints.latest_step() == 3
  assert loop.train(config, tmp_path / 'w') == 6
  assert 'after step 4' in capsys.readouterr().out
  jax.tree.map(
    np.testing.assert_array_equal, state(tmp_path / 'w'), state(local)
  )
  assert losses(tmp_path / 'w/metrics.jsonl') == losses(local / 'metrics.jsonl')
  assert not [*(tmp_path / 'ram').glob('*/*')]  # the run has finished


def test_a_copy_of_a_workdir_has_local_checkpoints_of_its_own(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.train.update(local_checkpoint_every=1)
  config.train.local_checkpoint_dir = str(tmp_path)
  state = {'w': jnp.zeros(3)}
  with workdir.local_tier(config, tmp_path / 'w', 'run') as tier:
    tier.save(5, state, {})
    with workdir.local_tier(config, tmp_path / 'copy', 'run') as other:
      assert other.restore(state, after=0) is None
      other.save(4, state, {})
      other.clear()
    assert tier.restore(state, after=0)[2] == 5


def test_local_steps_are_kept_until_the_last_checkpoint_is_whole(
  config, tmp_path, monkeypatch
):
  config = config.copy_and_resolve_references()
  config.train.update(local_checkpoint_every=1, sample_every=None)
  config.train.local_checkpoint_dir = str(tmp_path / 'ram')
  config.train.profile_at = None
  write, seen = manifest.write, []

  def late(directory, *rest):
    time.sleep(0.5)
    write(directory, *rest)

  def cleared(tier):
    seen.append((tmp_path / 'w/checkpoints/6' / manifest.NAME).exists())

  monkeypatch.setattr(manifest, 'write', late)
  monkeypatch.setattr(LocalTier, 'clear', cleared)
  loop.train(config, tmp_path / 'w')
  assert seen == [True]


def test_a_local_folder_that_cannot_be_used_is_refused(config, tmp_path):
  config = config.copy_and_resolve_references()
  (tmp_path / 'file').touch()
  for every, folder in (1, f'{tmp_path}/file'), (1, 'gs://b/x'), (None, '/tmp'):
    config.train.local_checkpoint_every = every
    config.train.local_checkpoint_dir = folder
    with pytest.raises(UsageError) as caught:
      workdir.local_tier(config, tmp_path / 'w', 'run')
    assert caught.value.key == 'config.train.local_checkpoint_dir'


def test_a_damaged_local_step_gives_way_to_the_one_before(tmp_path):
  from imagen_jax import sharding

  mesh = sharding.make_mesh(2, 4)
  shapes = {'w': jax.ShapeDtypeStruct((64, 256), jnp.float32)}
  shardings = sharding.state_shardings(shapes, mesh)
  abstract = sharding.with_shardings(shapes, shardings)
  noise = jax.random.normal(jax.random.key(0), (64, 256))
  tree = {'w': jax.device_put(noise, shardings['w'])}
  with LocalTier(tmp_path, 'run') as tier:
    for step in 1, 2, 3:
      tier.save(step, tree, {'data_step': step})
    assert tier.restore(abstract, after=3) is None
    restored, extra, step = tier.restore(abstract, after=0)
    assert (extra, step) == ({'data_step': 3}, 3)
    assert restored['w'].sharding == shardings['w']
    np.testing.assert_array_equal(restored['w'], noise)
    largest = max(
      (tmp_path / 'run/0/3').rglob('*'), key=lambda p: p.stat().st_size
    )
    raw = bytearray(largest.read_bytes())
    raw[100] ^= 1
    largest.write_bytes(raw)
    assert tier.restore(abstract, after=0)[2] == 2
    other = sharding.state_shardings(shapes, sharding.make_mesh(4, 2))
    abstract = sharding.with_shardings(shapes, other)
    assert tier.restore(abstract, after=0) is None  # of other devices
