"""Pretraining of the demo's text encoder, and the probe of what it knows."""

import functools
import json
import random

import numpy as np
import pytest
from safetensors.numpy import load_file

from imagen_jax.cli.configs import load_config
from imagen_jax.errors import UsageError
from imagen_jax.text import weights
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.text.tokenizer import Tokenizer
from imagen_jax.worlds import captions, probe, shapes
from imagen_jax.worlds import pretraining as pretrain
from tests.tiny_text import varied


def word_tokenizer(tmp_path):
  scenes = [shapes.scene(0, 'train', i) for i in range(3000)]
  path = tmp_path / 'spiece.model'
  path.write_bytes(pretrain.train_vocabulary([s.caption for s in scenes]))
  return Tokenizer(path), scenes


def test_every_word_of_the_world_is_a_piece_and_no_string_crashes(tmp_path):
  tokenizer, _ = word_tokenizer(tmp_path)
  known = captions.vocabulary()
  assert {w for w in known if len(tokenizer.pieces(w)) != 1} == set()
  assert tokenizer.pieces('A Red\tSTAR') == tokenizer.pieces('a red star')
  for text in varied(300):
    assert all(2 <= i < tokenizer.size for i in tokenizer.pieces(text))


def test_span_corruption_loses_nothing():
  rng, first = random.Random(0), 999
  for _ in range(300):
    ids = [rng.randint(3, 90) for _ in range(rng.randint(1, 30))]
    left, missing = pretrain.corrupt(rng, ids, first, density=0.3, mean_span=2)
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


def test_nouns_are_found_in_whatever_order_they_are_written(tmp_path):
  tokenizer, scenes = word_tokenizer(tmp_path)
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
  found = probe.shape_nouns(tokenizer, caption, meaning)
  assert found == [(disc, 1), (moons, 0)]
  assert probe.facts(meaning, 1)['down'] == 'below'
  assert pretrain.description(meaning, 1) == 'one purple circle below grey moon'
  for s in scenes:
    found = probe.shape_nouns(tokenizer, s.caption, s.meaning)
    assert sorted(g for _, g in found) == list(range(len(s.meaning.groups)))


def test_the_probe_reads_what_is_there_and_not_what_is_not():
  rng = np.random.default_rng(0)
  values = {a: rng.integers(0, 3, 900) for a in probe.ASPECTS}
  labels = [{a: f'{a}{v[i]}' for a, v in values.items()} for i in range(900)]
  x = rng.normal(size=(900, 20))
  x[:, :3] = np.eye(3)[values['colour']] + 0.1 * rng.normal(size=(900, 3))
  x = x @ rng.normal(size=(20, 20))
  scores = probe.linear_readout(
    x[:600], labels[:600], {'eval': (x[600:], labels[600:])}
  )
  assert scores['eval'].pop('colour') == 1
  assert max(scores['eval'].values()) < 0.5
  assert not probe.passes({'eval': {**scores['eval'], 'colour': 1}})


@pytest.fixture(scope='module')
def small_run(tmp_path_factory):
  """Three steps of pretraining, with a small probe."""
  config = load_config(
    'shapes_text',
    [
      'train.num_steps=3',
      'train.log_every=2',
      'train.batch_size=8',
      'encoder.num_layers=1',
      'decoder.num_layers=1',
      'data.num_scenes=120',
    ],
  )
  workdir = tmp_path_factory.mktemp('text')
  small = functools.partial(probe.probe, num_fit=60, num_test=30)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(probe, 'probe', small)
    assert pretrain.pretrain(config, workdir) is False
  return config, workdir


def test_pretraining_leaves_an_encoder_metrics_and_provenance(small_run):
  config, workdir = small_run
  encoder = load_text_encoder(workdir)
  assert encoder.max_len == config.train.max_len
  rows = [json.loads(r) for r in (workdir / 'metrics.jsonl').open()]
  assert [r['step'] for r in rows] == [2, 3]
  assert {'step', 'loss', 'images_per_sec'} <= rows[0].keys()
  provenance = json.loads((workdir / 'provenance.json').read_text())
  assert provenance['digest'] == encoder.digest
  assert {'command', 'commit', 'steps', 'seconds'} <= provenance.keys()
  stored = load_file(workdir / weights.SINGLE)
  assert {str(v.dtype) for v in stored.values()} == {'bfloat16'}


def test_no_steps_save_the_untrained_encoder(small_run, tmp_path, monkeypatch):
  config = small_run[0].copy_and_resolve_references()
  config.train.num_steps = 0
  small = functools.partial(probe.probe, num_fit=20, num_test=10)
  monkeypatch.setattr(probe, 'probe', small)
  pretrain.pretrain(config, tmp_path)
  provenance = json.loads((tmp_path / 'provenance.json').read_text())
  assert provenance['steps'] == 0
  assert provenance['probe']['trained'] == provenance['probe']['random']
  assert provenance['digest'] == load_text_encoder(tmp_path).digest


def test_the_emoji_captions_have_an_encoder_too(
  small_run, tmp_path, monkeypatch
):
  config = small_run[0].copy_and_resolve_references()
  with config.unlocked():
    config.data.update(kind='emoji', num_scenes=500)
  config.train.num_steps = 1
  small = functools.partial(probe.probe, num_fit=60, num_test=10)
  monkeypatch.setattr(probe, 'probe', small)
  pretrain.pretrain(config, tmp_path)
  provenance = json.loads((tmp_path / 'provenance.json').read_text())
  for scores in provenance['probe'].values():
    assert scores['heldout'].keys() == {'shape', 'count', 'across', 'down'}
  tokenizer = load_text_encoder(tmp_path).tokenizer
  assert len(tokenizer.pieces('an octopus below two palm trees')) == 6


def test_the_same_command_twice_does_not_train_twice(small_run):
  config, workdir = small_run
  before = (workdir / weights.SINGLE).stat().st_mtime_ns
  pretrain.pretrain(config, workdir)
  assert (workdir / weights.SINGLE).stat().st_mtime_ns == before
  other = config.copy_and_resolve_references()
  other.seed = 1
  with pytest.raises(UsageError, match='seed'):
    pretrain.pretrain(other, workdir)


@pytest.mark.parity
def test_a_pretrained_folder_is_a_genuine_hugging_face_t5(small_run):
  torch = pytest.importorskip('torch')
  from transformers import AutoTokenizer, T5EncoderModel

  config, workdir = small_run
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
