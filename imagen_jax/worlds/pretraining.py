"""Pretrains a small T5 on the captions of a world, without images.

The tasks are in `tasks.py`. Afterwards the encoder is frozen, like the paper's
(Section 2.1), and the decoder is discarded.
"""

import functools
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from ml_collections import ConfigDict

from imagen_jax.data.source import Source
from imagen_jax.data.sources import find_source
from imagen_jax.errors import UsageError
from imagen_jax.io.checkpoint import Checkpoints
from imagen_jax.nets.t5 import T5Encoder
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.text.tokenizer import PAD, VOCABULARY, Tokenizer
from imagen_jax.text.weights import save_folder
from imagen_jax.training.experiment import Experiment, Export
from imagen_jax.training.export import provenance
from imagen_jax.worlds import probe
from imagen_jax.worlds.tasks import (
  SENTINELS,
  TARGET_LEN,
  as_arrays,
  description,
  fitting_item,
)
from imagen_jax.worlds.vocabulary import train_vocabulary
from imagen_jax.worlds.world import World

PROVENANCE = 'provenance.json'
NUM_PREVIEWS = 8


class Captions(Source):
  """The scenes of a world as examples without images."""

  has_eval_split = True

  def __init__(self, scenes: Sequence):
    self._scenes = scenes

  def __len__(self):
    return len(self._scenes)

  def __getitem__(self, i):
    return {'scene': self._scenes[i]}

  def name(self, i):
    return f'scene {i}'


def directions(encoder, strength=2.0):
  """Offset to T5's initial relative position bias, [buckets, heads].

  Relations depend on word order, and this bias is a T5's only source of order.
  Initialised near zero, a small encoder learns words in minutes but hardly
  learns order. It learns both if its heads start out attending backwards,
  forwards, nearby backwards and nearby forwards.
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
  """A small Transformer decoder, used in pretraining only."""

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


class TextExperiment(Experiment):
  """Text pretraining; its config is like `configs/shapes_text.py`.

  After the last step the encoder is written to the workdir's `export/` as a
  Hugging Face folder, with a linear probe's accuracies in `provenance.json`.
  With `train.num_steps` = 0 it is the untrained encoder, as a baseline.

  Attributes:
    world: the `World` class whose captions are used.
    vocabulary: bytes of the sentencepiece model.
    encoder: the `T5Encoder`.
    decoder: the `Decoder`.

  Raises:
    UsageError: `data.kind` is no world.
  """

  name, resolution = 'text encoder', 0

  def __init__(
    self,
    config: ConfigDict,
    mesh: jax.sharding.Mesh | None = None,
    workdir: pathlib.Path | None = None,
  ):
    super().__init__(config, mesh, workdir)
    self.world = find_source(config.data.kind)
    if not issubclass(self.world, World):
      raise UsageError(
        f'data.kind is {config.data.kind!r}, which has no scenes to read; '
        'choose a synthetic world.'
      )
    source = self.source('train')
    texts = [source[i]['scene'].caption for i in range(len(source))]
    self.vocabulary = train_vocabulary(texts)
    self.tokenizer = _tokenizer(self.vocabulary)
    vocab_size = self.tokenizer.size + SENTINELS
    self.encoder = T5Encoder(vocab_size=vocab_size, **config.encoder)
    self.decoder = Decoder(
      vocab_size, width=self.encoder.width, **config.decoder
    )

  def make_source(self, split):
    data = self.config.data
    number = data.num_scenes if split == 'train' else data.num_eval_scenes
    return Captions(self.world.scenes(data.seed, split, number))

  def init(self, key):
    ids = jnp.zeros((1, TARGET_LEN), jnp.int32)
    memory = jnp.zeros((1, TARGET_LEN, self.encoder.width))
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    encoder = self.encoder.init(keys[0], ids, ids == 0)['params']
    decoder = self.decoder.init(keys[1], ids, memory, ids == 0)['params']
    encoder['distance_bias'] += directions(self.encoder)
    return {'encoder': encoder, 'decoder': decoder}

  def loss(self, params, key, batch, frozen):
    """Cross-entropy in nats, scaled so that its mean is over all tokens."""
    del key, frozen
    memory = self.encoder.apply(
      {'params': params['encoder']}, batch['ids'], batch['mask']
    )
    target = batch['target']
    previous = jnp.pad(target[:, :-1], ((0, 0), (1, 0)))
    logits = self.decoder.apply(
      {'params': params['decoder']}, previous, memory, batch['visible']
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    weight = target != PAD
    rows = jnp.sum(nats * weight, axis=1)
    return rows * (len(target) / jnp.sum(weight)), {}

  def batch_spec(self, batch_size):
    shape, length = jax.ShapeDtypeStruct, self.config.tasks.max_len
    return {
      'ids': shape((batch_size, length), jnp.int32),
      'mask': shape((batch_size, length), bool),
      'visible': shape((batch_size, length), bool),
      'target': shape((batch_size, TARGET_LEN), jnp.int32),
    }

  def augmentation(self):
    def choose(example, rng):
      seed = int(rng.integers(2**63))
      return example | {'item': self._item(random.Random(seed), example)}

    return choose

  def example(self, example):
    # Each example of the eval split always has the same task.
    item = example.get('item')
    if item is None:
      item = self._item(random.Random(example['index']), example)
    return as_arrays(item, self.config.tasks.max_len)

  def _item(self, rng, example):
    tasks = self.config.tasks
    return fitting_item(
      rng,
      example['scene'],
      self.world.nouns,
      self.tokenizer,
      tasks,
      tasks.max_len,
    )

  def make_preview(self, frozen):
    """Eval captions, each with the decoder's description of one thing."""
    del frozen
    if jax.process_index() != 0:
      return lambda params: None
    source = self.source('eval')
    scenes = [source[i]['scene'] for i in range(NUM_PREVIEWS)]
    rows, wanted = [], []
    for scene in scenes:
      position, group = self.world.nouns(
        self.tokenizer, scene.caption, scene.meaning
      )[0]
      ids, mask, _ = self.tokenizer([scene.caption], self.config.tasks.max_len)
      visible = np.arange(ids.shape[1]) == position
      rows.append((ids[0], mask[0], visible))
      wanted.append(description(scene.meaning, group))
    arrays = [np.stack(column) for column in zip(*rows)]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=self.vocabulary)
    say = jax.jit(self._say)

    def preview(params):
      said = np.asarray(say(jax.device_get(params), *arrays))
      lines = []
      for scene, right, ids in zip(scenes, wanted, said):
        known = [int(i) for i in ids if PAD < i < self.tokenizer.size]
        lines.append(
          f'{scene.caption}\n  said:  {pieces.decode(known)}\n  right: {right}'
        )
      return '\n'.join(lines)

    return preview

  def _say(self, params, ids, mask, visible):
    """Greedy decoding: [B, T] ids."""
    memory = self.encoder.apply({'params': params['encoder']}, ids, mask)

    def step(t, said):
      previous = jnp.pad(said[:, :-1], ((0, 0), (1, 0)))
      logits = self.decoder.apply(
        {'params': params['decoder']}, previous, memory, visible
      )
      return said.at[:, t].set(jnp.argmax(logits[:, t], axis=-1))

    start = jnp.zeros((len(ids), TARGET_LEN), jnp.int32)
    return jax.lax.fori_loop(0, TARGET_LEN, step, start)

  def finish(self, state, frozen):
    """Saves the encoder and prints a linear probe's accuracies."""
    del frozen
    out = self.workdir / 'export'
    if jax.process_index() != 0 or (out / PROVENANCE).exists():
      return
    trained = jax.device_get(state.ema_params['encoder'])
    untrained = self.init(jax.random.key(self.config.seed))['encoder']
    with tempfile.TemporaryDirectory() as folder:
      self.save(folder, untrained)
      chance = probe.probe(load_text_encoder(folder), self.world)
    shutil.rmtree(out, ignore_errors=True)
    digest = self.save(out, trained)
    scores = probe.probe(load_text_encoder(out), self.world)
    gate = probe.passes(scores)
    print('linear probe at the nouns, accuracy in %:')
    print(f' trained\n{probe.table(scores)}')
    print(f' random, frozen\n{probe.table(chance)}')
    print(
      f'gate ({", ".join(probe.GATE)} >= 99 %):', 'ok' if gate else 'FAILED'
    )
    record = provenance('train.py') | {
      'steps': int(state.step),
      'digest': digest,
      'parameters': sum(p.size for p in jax.tree.leaves(trained)),
      'probe': {'trained': scores, 'random': chance},
      'gate': gate,
      'config': json.loads(json.dumps(self.config.to_dict())),
    }
    text = json.dumps(record, indent=2) + '\n'
    (out / PROVENANCE).write_text(text, encoding='utf-8')

  def save(self, folder: str | pathlib.Path, params: dict) -> str:
    """Writes an encoder as a Hugging Face T5 folder in bfloat16.

    Args:
      folder: to write.
      params: of the encoder.

    Returns:
      the encoder's digest, which a stage records.
    """
    length = self.config.tasks.max_len
    tokens = {
      'tokenizer_class': 'T5Tokenizer',
      'model_max_length': length,
      'extra_ids': SENTINELS,
      'eos_token': '</s>',
      'unk_token': '<unk>',
      'pad_token': '<pad>',
    }
    text = json.dumps(tokens, indent=2) + '\n'
    save_folder(
      folder,
      self.encoder,
      params,
      files={
        VOCABULARY: self.vocabulary,
        'tokenizer_config.json': text.encode(),
      },
      dtype=jnp.bfloat16,
      n_positions=length,
    )
    return load_text_encoder(folder).digest

  @classmethod
  def export(cls, request: Export) -> str:
    record = json.loads((request.workdir / 'config.json').read_text())
    experiment = cls(ConfigDict(record['config']))
    part = {'ema': 'ema_params', 'raw': 'params'}[request.weights]
    if request.out.exists():
      raise UsageError(f'{request.out} exists; choose another.', key='out')
    with Checkpoints(request.workdir / 'checkpoints') as checkpoints:
      params, _, step = checkpoints.restore_subtree(part, request.step)
    experiment.save(request.out, params['encoder'])
    return f'{request.out}: step {step}, {request.weights} weights'


def _tokenizer(vocabulary):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / VOCABULARY
    path.write_bytes(vocabulary)
    return Tokenizer(path)
