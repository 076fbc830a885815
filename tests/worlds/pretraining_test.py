"""Pretraining a world's text encoder, and its linear probe."""

import functools
import json
import random

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from imagen_jax.cli import export
from imagen_jax.cli.configs import load_config
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import model_folder, text_folder
from imagen_jax.text import weights
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.text.tokenizer import PAD, Tokenizer
from imagen_jax.training import loop
from imagen_jax.worlds import captions, pretraining, probe, shapes, tasks
from imagen_jax.worlds.shapes import nouns
from imagen_jax.worlds.vocabulary import train_vocabulary
from tests.tiny_text import varied


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  """(tokenizer, the scenes whose captions it was learned from)."""
  scenes = [shapes.scene(0, 'train', i) for i in range(3000)]
  path = tmp_path_factory.mktemp('words') / 'spiece.model'
  path.write_bytes(train_vocabulary([s.caption for s in scenes]))
  return Tokenizer(path), scenes


def test_every_word_of_the_world_is_a_piece_and_no_string_crashes(words):
  tokenizer, _ = words
  known = captions.vocabulary()
  assert {w for w in known if len(tokenizer.pieces(w)) != 1} == set()
  assert tokenizer.pieces('A Red\tSTAR') == tokenizer.pieces('a red star')
  for text in varied(300):
    assert all(2 <= i < tokenizer.size for i in tokenizer.pieces(text))


def test_span_corruption_loses_nothing():
  rng, first = random.Random(0), 999
  for _ in range(300):
    ids = [rng.randint(3, 90) for _ in range(rng.randint(1, 30))]
    left, missing = tasks.corrupt(rng, ids, first, density=0.3, mean_span=2)
    spans = {}
    for token in missing:
      if token > 900:
        spans[token] = []
        last = token
      else:
        spans[last].append(token)
    assert list(spans) == [t for t in left if t > 900]
    assert list(spans) == [first - k for k in range(len(spans))]
    whole = [t for token in left for t in spans.get(token, [token])]
    assert whole == ids
    gone = sum(map(len, spans.values()))
    assert gone == max(1, round(0.3 * len(ids))) and min(
      map(len, spans.values())
    )


def test_nouns_are_found_in_whatever_order_they_are_written(words):
  tokenizer, scenes = words
  caption = (
    'A drawing of a violet disc with two striped gray crescents above it.'
  )
  meaning = captions.Meaning(
    (
      captions.Group('moon', 'grey', count=2, fill='striped'),
      captions.Group('circle', 'purple'),
    ),
    ((0, 'above', 1),),
  )
  disc, moons = 5, 10
  found = nouns(tokenizer, caption, meaning)
  assert found == [(disc, 1), (moons, 0)]
  assert probe.facts(meaning, 1)['down'] == 'below'
  assert tasks.description(meaning, 1) == 'one purple circle below grey moon'
  for s in scenes:
    found = nouns(tokenizer, s.caption, s.meaning)
    assert sorted(g for _, g in found) == list(range(len(s.meaning.groups)))


def test_the_probe_reads_what_is_there_and_not_what_is_not():
  rng = np.random.default_rng(0)
  values = {a: rng.integers(0, 3, 900) for a in probe.ASPECTS}
  labels = [{a: f'{a}{v[i]}' for a, v in values.items()} for i in range(900)]
  x = rng.normal(size=(900, 20))
  x[:, :3] = np.eye(3)[values['colour']] + 0.1 * rng.normal(size=(900, 3))
  x = x @ rng.normal(size=(20, 20))
  scores = probe.linear_readout(
    (x[:600], labels[:600]), {'eval': (x[600:], labels[600:])}
  )
  assert scores['eval'].pop('colour') == 1
  assert max(scores['eval'].values()) < 0.5
  assert not probe.passes({'eval': {**scores['eval'], 'colour': 1}})


def quick(config, workdir):
  """Trains with a small probe; returns the provenance."""
  with pytest.MonkeyPatch.context() as patch:
    small = functools.partial(probe.probe, num_fit=60, num_test=10)
    patch.setattr(probe, 'probe', small)
    loop.train(config, workdir)
  return json.loads((workdir / 'export' / 'provenance.json').read_text())


def changed(config, **train):
  """A copy that only trains: without samples and held-out loss."""
  config = config.copy_and_resolve_references()
  config.train.update(sample_every=None, eval_every=None, **train)
  return config


@pytest.fixture(scope='module')
def small_run(tmp_path_factory):
  """(config, workdir, provenance) of three steps of pretraining."""
  config = load_config(
    'shapes_text',
    [
      'mesh.data=2',
      'train.num_steps=3',
      'train.log_every=2',
      'train.batch_size=8',
      'train.sample_every=3',
      'train.eval_every=3',
      'encoder.num_layers=1',
      'encoder.width=32',
      'encoder.head_dim=8',
      'encoder.mlp_dim=32',
      'decoder.num_layers=1',
      'data.num_scenes=120',
      'data.num_eval_scenes=16',
    ],
  )
  workdir = tmp_path_factory.mktemp('text')
  return config, workdir, quick(config, workdir)


def metrics(workdir):
  return [json.loads(r) for r in (workdir / 'metrics.jsonl').open()]


def test_pretraining_leaves_an_encoder_metrics_samples_provenance(small_run):
  config, workdir, provenance = small_run
  encoder = load_text_encoder(workdir / 'export')
  assert encoder.max_len == config.tasks.max_len
  rows = metrics(workdir)
  assert [r['step'] for r in rows] == [2, 3]
  assert {'step', 'loss', 'images_per_sec'} <= rows[0].keys()
  assert 0 < rows[1]['heldout_loss_ema'] < 20
  assert not any(key.startswith('loss_t') for key in rows[0])
  sample = (workdir / 'samples' / 'step_0000003.txt').read_text()
  assert sample.count('right: ') == pretraining.NUM_PREVIEWS
  assert provenance['digest'] == encoder.digest
  assert {'command', 'commit', 'steps', 'gate'} <= provenance.keys()
  stored = load_file(workdir / 'export' / weights.SINGLE)
  assert {str(v.dtype) for v in stored.values()} == {'bfloat16'}


def test_a_stage_finds_the_encoder_in_its_workdir(small_run):
  _, workdir, provenance = small_run
  folder = text_folder.find(str(workdir))
  assert load_text_encoder(folder).digest == provenance['digest']
  with pytest.raises(ModelError):  # a text encoder's workdir is no stage
    model_folder.find_stages(workdir)


def test_a_resumed_pretraining_is_the_uninterrupted_one(small_run, tmp_path):
  config, provenance = changed(small_run[0]), small_run[2]
  loop.train(config, tmp_path, should_stop=lambda step: step == 2)
  assert not (tmp_path / 'export').exists()
  again = quick(config, tmp_path)
  assert again['digest'] == provenance['digest']


def test_the_loss_is_the_mean_over_the_tokens(small_run):
  made = pretraining.TextExperiment(small_run[0])
  model, source = made.model, made.source('eval')
  rows = [made.example(source[i] | {'index': i}) for i in range(4)]
  batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
  previous = np.pad(batch['target'][:, :-1], ((0, 0), (1, 0)))

  @jax.jit
  def both(key):
    params = made.init(key)
    values, _ = made.loss(params, None, batch, {})
    memory = model.encoder.apply(
      {'params': params['encoder']}, batch['ids'], batch['mask']
    )
    logits = model.decoder.apply(
      {'params': params['decoder']}, previous, memory, batch['visible']
    )
    return values, -jax.nn.log_softmax(logits)

  values, nats = both(jax.random.key(0))
  there = batch['target'] != PAD
  target = batch['target'][..., None]
  right = np.take_along_axis(np.asarray(nats), target, axis=-1)[..., 0]
  assert float(values.mean()) == pytest.approx(right[there].mean(), rel=1e-5)


@pytest.fixture(scope='module')
def emoji_run(small_run, tmp_path_factory):
  """(config, workdir, provenance) of no steps on the captions of emoji."""
  config = changed(small_run[0], num_steps=0)
  config.data.update(kind='emoji', num_scenes=150)
  config.decoder.num_layers = 0  # of no use here
  workdir = tmp_path_factory.mktemp('emoji')
  return config, workdir, quick(config, workdir)


def test_no_steps_save_the_untrained_encoder(emoji_run):
  provenance = emoji_run[2]
  assert provenance['steps'] == 0
  assert provenance['probe']['trained'] == provenance['probe']['random']


def test_the_emoji_captions_have_an_encoder_too(emoji_run):
  config, workdir, provenance = emoji_run
  for scores in provenance['probe'].values():
    assert scores['heldout'].keys() == {'shape', 'count', 'across', 'down'}
  tokenizer = load_text_encoder(workdir / 'export').tokenizer
  assert len(tokenizer.pieces('an octopus below two palm trees')) == 6
  made, rng = pretraining.TextExperiment(config), np.random.default_rng(0)
  source, choose = made.source('train'), made.augmentation('train')
  spec = made.batch_spec(1)
  for i in range(100):
    row = made.example(choose(source[i], rng))
    assert {k: (v[None].shape, v.dtype) for k, v in row.items()} == {
      k: (v.shape, v.dtype) for k, v in spec.items()
    }
    assert row['visible'].any() and (row['target'] != PAD).any()


def test_a_finished_pretraining_stays_as_it_is(small_run):
  config, workdir, _ = small_run
  file = workdir / 'export' / weights.SINGLE
  before = file.stat().st_mtime_ns
  loop.train(config, workdir)
  assert file.stat().st_mtime_ns == before
  other = config.copy_and_resolve_references()
  other.seed = 1
  with pytest.raises(UsageError) as error:
    loop.train(other, workdir)
  assert 'seed' in str(error.value)


def test_a_checkpoint_can_be_exported_before_the_end(small_run, tmp_path):
  _, workdir, provenance = small_run
  words = ['--workdir', str(workdir), '--out', str(tmp_path / 'text')]
  assert export.main(words) == 0
  found = load_text_encoder(tmp_path / 'text').digest
  assert found == provenance['digest']


def test_only_worlds_have_scenes_to_read(small_run):
  config = small_run[0].copy_and_resolve_references()
  config.data.kind = 'folder'
  with pytest.raises(UsageError):
    pretraining.TextExperiment(config)


@pytest.mark.parity
def test_a_pretrained_folder_is_a_genuine_hugging_face_t5(small_run):
  torch = pytest.importorskip('torch')
  from transformers import AutoTokenizer, T5EncoderModel

  workdir = small_run[1] / 'export'
  encoder = load_text_encoder(workdir)
  prompts = [shapes.scene(0, 'eval', i).caption for i in range(200)]
  prompts += ['A watercolour of über-cats, 7 of them?', '']
  emb, mask = encoder.encode(prompts)
  ids, _, _ = encoder.tokenize(prompts)
  theirs = AutoTokenizer.from_pretrained(workdir, local_files_only=True)
  batch = theirs(
    prompts,
    padding='max_length',
    max_length=encoder.max_len,
    truncation=True,
    return_tensors='pt',
  )
  np.testing.assert_array_equal(ids, batch['input_ids'].numpy())
  last = theirs.convert_tokens_to_ids('<extra_id_0>')
  assert last == encoder.module.vocab_size - 1
  model = T5EncoderModel.from_pretrained(workdir, dtype=torch.float32).eval()
  with torch.no_grad():
    out = model(**batch).last_hidden_state.numpy()
  assert np.abs(out - emb)[mask].max() < 1e-5
