"""Pretrains a small T5 on the captions of a world, text alone.

Two tasks share one encoder and one small decoder, which is thrown away:
span corruption, as T5 was trained (Raffel et al. 2020, Section 3.1.4), and
descriptions: of one thing of the caption, in a fixed order of words, by a
decoder that sees the embedding of that thing's noun and nothing else. The
second makes each noun a summary of its thing: what is said of it, and where it
stands.
"""

import functools
import io
import json
import pathlib
import random
import re
import string
import sys
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece

from imagen_jax.errors import UsageError
from imagen_jax.io.files import git_commit
from imagen_jax.nets.t5 import T5Encoder
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.text.tokenizer import EOS, PAD, VOCABULARY, Tokenizer
from imagen_jax.text.weights import save_folder
from imagen_jax.worlds import captions, probe

SENTINELS = 8  # <extra_id_0> … <extra_id_7>, the last ids, counted downwards
TARGET_LEN = 20  # the longest description has 17 tokens
PROVENANCE = 'provenance.json'
CHARACTERS = sorted(set(map(chr, range(33, 127))) - set(string.ascii_uppercase))


def train_vocabulary(texts):
  """Bytes of a sentencepiece unigram model, with T5's special ids.

  Every word of the captions is a piece; any other word is spelled in ASCII
  characters, and what is left is <unk>. Upper case is read as lower case.
  """
  lines = [' '.join(re.findall(r'\w+|[^\w\s]', text.lower())) for text in texts]
  words = {}
  for word in ' '.join(lines).split():
    if word.isalnum():
      words[word] = words.get(word, 0) + 1
  out = io.BytesIO()
  with tempfile.TemporaryDirectory() as folder:
    # Seeds: sentencepiece's own are substrings of at least two words, which
    # would cut up 'small'.
    seeds = pathlib.Path(folder) / 'seeds.tsv'
    seeds.write_text(
      ''.join(f'▁{word}\t{n}\n' for word, n in sorted(words.items()))
      + ''.join(f'{c}\t1\n' for c in CHARACTERS),
      encoding='utf-8',
    )
    rules = pathlib.Path(folder) / 'rules.tsv'
    spaces = [(c, ' ') for c in '\t\n\r\u00a0\u2009\u3000']
    folds = [(c, c.lower()) for c in string.ascii_uppercase]
    quotes = [('\u2018', "'"), ('\u2019', "'")]
    quotes += [('\u201c', '"'), ('\u201d', '"')]
    rules.write_text(
      ''.join(
        f'{ord(a):X}\t{ord(b):X}\n' for a, b in (*spaces, *folds, *quotes)
      ),
      encoding='utf-8',
    )
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=out,
      model_type='unigram',
      vocab_size=600,
      hard_vocab_limit=False,
      seed_sentencepieces_file=str(seeds),
      required_chars=''.join(CHARACTERS),
      normalization_rule_tsv=str(rules),
      pad_id=PAD,
      eos_id=EOS,
      unk_id=2,
      bos_id=-1,
      num_threads=1,
      minloglevel=2,
    )
  return out.getvalue()


def description(meaning, group):
  """One thing in words of a fixed order, with what it relates to."""
  g = meaning.groups[group]
  words = [captions.NUMBERS[g.count - 1], g.size, g.fill, g.colour, g.shape]
  for word, other in probe.relations_of(meaning, group):
    b = meaning.groups[other]
    words += [word, b.colour, b.shape]
  if meaning.background:
    words += ['on', meaning.background]
  return ' '.join(word for word in words if word)


def corrupt(rng, ids, first_sentinel, *, density, mean_span):
  """Span corruption of one caption: (what is left, what is missing).

  About `density` of the tokens go, in spans of `mean_span` on average. Each
  span leaves a sentinel, counted down from `first_sentinel`; the target is
  each sentinel followed by its span.
  """
  number = max(1, round(density * len(ids)))
  spans = min(max(1, round(number / mean_span)), SENTINELS)
  # Random compositions: lengths of the spans, and of what lies between.
  lengths = _compose(rng, number, spans)
  gaps = _compose(rng, len(ids) - number + 2, spans + 1)
  gaps[0], gaps[-1] = gaps[0] - 1, gaps[-1] - 1
  left, missing, at = [], [], 0
  for k in range(spans):
    left += [*ids[at : at + gaps[k]], first_sentinel - k]
    at += gaps[k]
    missing += [first_sentinel - k, *ids[at : at + lengths[k]]]
    at += lengths[k]
  return left + list(ids[at:]), missing


def _compose(rng, total, parts):
  """`parts` whole numbers >= 1 of the given sum (0s where it is too small)."""
  parts = min(parts, total)
  cuts = sorted(rng.sample(range(1, total), parts - 1))
  return [b - a for a, b in zip([0, *cuts], [*cuts, total])]


def _with_unknown_words(rng, caption):
  """The caption with one or two words put in that nobody has ever seen."""
  words = caption.split()
  for _ in range(1 + (rng.random() < 0.3)):
    word = ''.join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7)))
    words.insert(rng.randint(0, len(words)), word)
  return ' '.join(words)


def example(rng, scene, nouns, tokenizer, first_sentinel, config):
  """(encoder ids, visible positions or None for all, decoder target ids)."""
  if rng.random() < config.span_fraction:
    ids = tokenizer.pieces(scene.caption)
    left, missing = corrupt(
      rng,
      ids,
      first_sentinel,
      density=config.span_density,
      mean_span=config.mean_span,
    )
    return [*left, EOS], None, [*missing, EOS]
  caption = scene.caption
  if rng.random() < config.oov_fraction:
    caption = _with_unknown_words(rng, caption)
  found = nouns(tokenizer, caption, scene.meaning)
  if not found:  # a stranger has come between 'palm' and 'tree'
    caption = scene.caption
    found = nouns(tokenizer, caption, scene.meaning)
  position, group = rng.choice(found)
  target = tokenizer.pieces(description(scene.meaning, group))
  return [*tokenizer.pieces(caption), EOS], position, [*target, EOS]


def batches(scenes, nouns, tokenizer, first_sentinel, config, *, seed):
  """Endless batches; half as long where all captions of a batch are short.

  Yields:
    (ids [B, L], mask [B, L], visible [B, L], target [B, TARGET_LEN]) with L
    either `max_len` or half of it, which most captions fit.
  """
  rng = random.Random(seed)
  short = config.max_len // 2
  waiting = {short: [], config.max_len: []}
  while True:
    scene = rng.choice(scenes)
    item = example(rng, scene, nouns, tokenizer, first_sentinel, config)
    if len(item[0]) > config.max_len or len(item[2]) > TARGET_LEN:
      continue
    length = short if len(item[0]) <= short else config.max_len
    waiting[length].append(item)
    if len(waiting[length]) < config.batch_size:
      continue
    items, waiting[length] = waiting[length], []
    ids = np.full((len(items), length), PAD, np.int32)
    visible = np.zeros(ids.shape, bool)
    target = np.full((len(items), TARGET_LEN), PAD, np.int32)
    for row, (source, position, wanted) in enumerate(items):
      ids[row, : len(source)] = source
      if position is None:
        visible[row, : len(source)] = True
      else:
        visible[row, position] = True
      target[row, : len(wanted)] = wanted
    yield ids, ids != PAD, visible, target


def directions(encoder, strength=2.0):
  """A start for T5's distance bias: heads that look one way, [buckets, heads].

  Who is left of whom is a question of order, and a T5 sees order through this
  bias alone. From its usual start near zero a small encoder learns words in
  minutes and order hardly at all; heads that look back, ahead, near back and
  near ahead from the beginning learn both.
  """
  half = encoder.num_buckets // 2
  bias = np.empty((encoder.num_buckets, encoder.num_heads), np.float32)
  for head in range(encoder.num_heads):
    sign = 1 if head % 2 else -1
    near = 0.5 * (head // 2 % 2) * np.arange(half)
    bias[:half, head] = -sign * strength - near  # keys before the query
    bias[half:, head] = sign * strength - near
  return bias


class Decoder(nn.Module):
  """A small Transformer decoder, used in pretraining alone."""

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int

  @nn.compact
  def __call__(self, previous, memory, visible):
    """previous [B, T] ids, memory [B, L, D], visible [B, L] -> logits."""
    steps = previous.shape[1]
    attend = functools.partial(
      nn.MultiHeadDotProductAttention, num_heads=self.num_heads
    )
    init = nn.initializers.normal(0.02)
    x = nn.Embed(self.vocab_size, self.width, embedding_init=init)(previous)
    x = x + self.param('position', init, (steps, self.width))
    causal = nn.make_causal_mask(previous)
    for _ in range(self.num_layers):
      h = nn.LayerNorm()(x)
      x = x + attend()(h, mask=causal)
      h = nn.LayerNorm()(x)
      x = x + attend()(h, memory, mask=visible[:, None, None, :])
      h = nn.Dense(2 * self.width)(nn.LayerNorm()(x))
      x = x + nn.Dense(self.width)(nn.gelu(h))
    return nn.Dense(self.vocab_size)(nn.LayerNorm()(x))


def loss_fn(params, encoder, decoder, ids, mask, visible, target):
  """Mean cross-entropy of the target's tokens, in nats."""
  memory = encoder.apply({'params': params['encoder']}, ids, mask)
  previous = jnp.pad(target[:, :-1], ((0, 0), (1, 0)))
  logits = decoder.apply(
    {'params': params['decoder']}, previous, memory, visible
  )
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
  weight = target != PAD
  return jnp.sum(nats * weight) / jnp.sum(weight)


def pretrain(config, workdir):
  """Trains vocabulary and encoder, saves them as a Hugging Face folder.

  Short enough to have no checkpoints: an interrupted run starts again. With
  `train.num_steps` = 0 it saves the untrained encoder, to compare with.

  Args:
    config: `configs/shapes_text.py`'s or `configs/emoji_text.py`'s.
    workdir: gets config.json, model.safetensors (bfloat16), spiece.model,
      tokenizer_config.json, metrics.jsonl and provenance.json.

  Returns:
    whether the linear probe passes the gate.

  Raises:
    UsageError: the workdir holds an encoder of another config.
  """
  workdir = pathlib.Path(workdir)
  settings = json.loads(json.dumps(config.to_dict()))
  record = workdir / PROVENANCE
  if record.exists():
    old = json.loads(record.read_text(encoding='utf-8'))
    if old['config'] != settings:
      raise UsageError(
        f'{workdir} holds a text encoder of another config or seed; use '
        'another --workdir.'
      )
    print(f'{workdir} is finished.')
    return old['gate']
  began = time.perf_counter()
  data, world = config.data, config.data.get('kind', 'shapes')
  scenes = probe.scenes(world, data.seed, 'train', data.num_scenes)
  workdir.mkdir(parents=True, exist_ok=True)

  vocabulary = train_vocabulary([s.caption for s in scenes])
  (workdir / VOCABULARY).write_bytes(vocabulary)
  tokenizer = Tokenizer(workdir / VOCABULARY)
  vocab_size = tokenizer.size + SENTINELS
  encoder = T5Encoder(vocab_size=vocab_size, **config.encoder)
  decoder = Decoder(
    vocab_size,
    width=encoder.width,
    num_layers=config.decoder.num_layers,
    num_heads=config.decoder.num_heads,
  )

  def init(key):
    ids = jnp.zeros((1, TARGET_LEN), jnp.int32)
    memory = jnp.zeros((1, TARGET_LEN, encoder.width))
    return {
      'encoder': encoder.init(jax.random.fold_in(key, 0), ids, ids == 0)[
        'params'
      ],
      'decoder': decoder.init(
        jax.random.fold_in(key, 1), ids, memory, ids == 0
      )['params'],
    }

  params = jax.jit(init)(jax.random.key(config.seed))
  params['encoder']['distance_bias'] += directions(encoder)
  untrained = params['encoder']
  train = config.train
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(
      optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=train.learning_rate,
        warmup_steps=min(train.warmup, train.num_steps // 10),
        decay_steps=max(train.num_steps, 1),
      )
    ),
  )

  @jax.jit
  def step_fn(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, encoder, decoder, *batch)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss

  opt_state = tx.init(params)
  stream = batches(
    scenes,
    probe.nouns(world),
    tokenizer,
    vocab_size - 1,
    train,
    seed=f'text/{config.seed}',
  )
  losses, since = [], time.perf_counter()
  with (workdir / 'metrics.jsonl').open('w', encoding='utf-8') as metrics:
    for step in range(1, train.num_steps + 1):
      params, opt_state, loss = step_fn(params, opt_state, next(stream))
      losses.append(loss)
      if step % train.log_every == 0 or step == train.num_steps:
        value = float(np.mean(jax.device_get(losses)))
        now = time.perf_counter()
        rate = len(losses) * train.batch_size / (now - since)
        losses, since = [], now
        # Captions per second, under the name that every stage uses.
        row = {'step': step, 'loss': value, 'images_per_sec': round(rate, 1)}
        metrics.write(json.dumps(row) + '\n')
        metrics.flush()
        print(
          f'step {step}/{train.num_steps}  loss {value:.4f}  '
          f'{rate:.0f} captions/s',
          file=sys.stderr,
          flush=True,
        )

  seconds = time.perf_counter() - began
  save(workdir, encoder, params['encoder'], vocabulary, config)
  trained = load_text_encoder(workdir)
  scores = probe.probe(trained, world=world)
  with tempfile.TemporaryDirectory() as folder:
    save(folder, encoder, untrained, vocabulary, config)
    chance = probe.probe(load_text_encoder(folder), world=world)
  gate = probe.passes(scores)
  print('linear probe at the nouns, accuracy in %:')
  print(f' trained\n{probe.table(scores)}')
  print(f' random, frozen\n{probe.table(chance)}')
  print(f'gate ({", ".join(probe.GATE)} >= 99 %):', 'ok' if gate else 'FAILED')
  provenance = {
    'command': ' '.join(sys.argv),
    'commit': git_commit(),
    'steps': train.num_steps,
    'seconds': round(seconds),
    'jax': jax.__version__,
    'digest': trained.digest,
    'parameters': sum(p.size for p in jax.tree.leaves(trained.params)),
    'probe': {'trained': scores, 'random': chance},
    'gate': gate,
    'config': settings,
  }
  record.write_text(json.dumps(provenance, indent=2) + '\n', encoding='utf-8')
  return gate


def save(folder, encoder, params, vocabulary, config):
  """The encoder as a Hugging Face T5 folder, in bfloat16."""
  tokens = {
    'tokenizer_class': 'T5Tokenizer',
    'model_max_length': config.train.max_len,
    'extra_ids': SENTINELS,
    'eos_token': '</s>',
    'unk_token': '<unk>',
    'pad_token': '<pad>',
  }
  save_folder(
    folder,
    encoder,
    params,
    files={
      VOCABULARY: vocabulary,
      'tokenizer_config.json': (json.dumps(tokens, indent=2) + '\n').encode(),
    },
    dtype=jnp.bfloat16,
    n_positions=config.train.max_len,
  )
