"""Pretrains a small T5 on the captions of a world, without images.

The tasks are in `tasks.py`. Afterwards the encoder is frozen, like the paper's
(Section 2.1), and the decoder is discarded.
"""

import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from ml_collections import ConfigDict

from imagen_jax.data.source import Source
from imagen_jax.data.sources import find_source
from imagen_jax.errors import UsageError
from imagen_jax.io import model_folder
from imagen_jax.io.files import write_json
from imagen_jax.nets.t5 import T5Encoder
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.text.tokenizer import PAD, VOCABULARY, load_tokenizer
from imagen_jax.text.weights import save_folder
from imagen_jax.training.experiment import Augment, Experiment, Export, Tree
from imagen_jax.training.export import provenance, trained_params
from imagen_jax.training.state import TrainState
from imagen_jax.typing import Array
from imagen_jax.worlds import probe
from imagen_jax.worlds.network import Decoder, Params, TextModel
from imagen_jax.worlds.tasks import (
  SENTINELS,
  TARGET_LEN,
  Tasks,
  as_arrays,
  description,
)
from imagen_jax.worlds.vocabulary import train_vocabulary
from imagen_jax.worlds.world import Scene, World

PROVENANCE = 'provenance.json'
NUM_PREVIEWS = 8


class Captions(Source):
  """The scenes of a world as examples without images."""

  has_eval_split = True

  def __init__(self, scenes: Sequence[Scene]):
    self._scenes = scenes

  def __len__(self) -> int:
    return len(self._scenes)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return {'scene': self._scenes[i]}


class TextExperiment(Experiment):
  """Text pretraining; its config is like `configs/shapes_text.py`.

  After the last step the encoder is written to the workdir's `export/` as a
  Hugging Face folder, with a linear probe's accuracies in `provenance.json`.
  With `train.num_steps` = 0 it is the untrained encoder, as a baseline.

  Attributes:
    world: the `World` class whose captions are used.
    vocabulary: bytes of the sentencepiece model.
    model: the `TextModel`.

  Raises:
    UsageError: `data.kind` is no world.
  """

  name, resolution = 'text encoder', 0
  needs_local_workdir = True

  def __init__(
    self,
    config: ConfigDict,
    mesh: jax.sharding.Mesh | None = None,
    workdir: pathlib.Path | None = None,
  ):
    super().__init__(config, mesh, workdir)
    world = find_source(config.data.kind)
    if not issubclass(world, World):
      raise UsageError(
        f'data.kind is {config.data.kind!r}, which has no scenes to read; '
        'choose shapes, emoji or a World of your own.'
      )
    self.world: type[World] = world
    source = self.source('train')
    texts = [source[i]['scene'].caption for i in range(len(source))]
    self.vocabulary = train_vocabulary(texts)
    with tempfile.TemporaryDirectory() as folder:
      (pathlib.Path(folder) / VOCABULARY).write_bytes(self.vocabulary)
      self.tokenizer = load_tokenizer(folder)
    self.tasks = Tasks(world, self.tokenizer, config.tasks)
    vocab_size = self.tokenizer.size + SENTINELS
    encoder = T5Encoder(vocab_size=vocab_size, **config.encoder)
    decoder = Decoder(vocab_size, width=encoder.width, **config.decoder)
    self.model = TextModel(encoder, decoder)

  def make_source(self, split: str) -> Captions:
    data = self.config.data
    number = data.num_scenes if split == 'train' else data.num_eval_scenes
    return Captions(self.world.scenes(data.seed, split, number))

  def init(self, key: jax.Array) -> Params:
    return self.model.init(key)

  def loss(
    self, params: Tree, key: jax.Array, batch: Tree, frozen: Tree
  ) -> tuple[Array, dict]:
    del key, frozen
    return self.model.loss(params, batch), {}

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    caption, target = self.config.tasks.max_len, TARGET_LEN
    return {
      name: jax.ShapeDtypeStruct((batch_size, length), dtype)
      for name, length, dtype in (
        ('ids', caption, jnp.int32),
        ('mask', caption, bool),
        ('visible', caption, bool),
        ('target', target, jnp.int32),
      )
    }

  def workers(self, split: str) -> int:
    return 0  # it reads no images

  def augmentation(self, split: str) -> Augment | None:
    if split != 'train':
      return None

    def choose(example: dict, rng: np.random.Generator) -> dict:
      seed = int(rng.integers(2**63))
      item = self.tasks.item(random.Random(seed), example['scene'])
      return example | {'item': item}

    return choose

  def example(self, example: dict) -> dict:
    # Each example of the eval split always has the same task.
    item = example.get('item')
    if item is None:
      rng = random.Random(example['index'])
      item = self.tasks.item(rng, example['scene'])
    return as_arrays(item, self.config.tasks.max_len)

  def make_preview(self, frozen: Tree) -> Callable[[Tree], str | None]:
    """Eval captions, each with the decoder's description of one thing."""
    del frozen
    if jax.process_index() != 0:
      return lambda params: None
    source = self.source('eval')
    scenes = [source[i]['scene'] for i in range(NUM_PREVIEWS)]
    captions = [scene.caption for scene in scenes]
    ids, mask, _ = self.tokenizer(captions, self.config.tasks.max_len)
    # The first noun of each caption, and its group.
    nouns = [
      self.world.nouns(self.tokenizer, s.caption, s.meaning)[0] for s in scenes
    ]
    visible = np.arange(ids.shape[1]) == [[position] for position, _ in nouns]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=self.vocabulary)
    decode = jax.jit(self.model.decode)

    def preview(params: Tree) -> str:
      said = np.asarray(decode(jax.device_get(params), ids, mask, visible))
      lines = []
      for scene, (_, group), tokens in zip(scenes, nouns, said):
        known = [int(i) for i in tokens if PAD < i < self.tokenizer.size]
        lines += [
          scene.caption,
          f'  said:  {pieces.decode(known)}',
          f'  right: {description(scene.meaning, group)}',
        ]
      return '\n'.join(lines)

    return preview

  def finish(self, state: TrainState, frozen: Tree) -> None:
    """Saves the encoder and prints a linear probe's accuracies."""
    del frozen
    if self.workdir is None or jax.process_index() != 0:
      return
    out = self.workdir / 'export'
    if (out / PROVENANCE).exists():
      return
    trained = jax.device_get(state.ema_params['encoder'])
    untrained = jax.jit(self.init)(jax.random.key(self.config.seed))
    with tempfile.TemporaryDirectory() as folder:
      self.save(folder, untrained['encoder'])
      chance = probe.probe(load_text_encoder(folder), self.world)
    shutil.rmtree(out, ignore_errors=True)
    self.save(out, trained)
    encoder = load_text_encoder(out)
    scores = probe.probe(encoder, self.world)
    gate = probe.passes(scores)
    print('linear probe at the nouns, accuracy in %:')
    print(f' trained\n{probe.table(scores)}')
    print(f' random, frozen\n{probe.table(chance)}')
    print(
      f'gate ({", ".join(probe.GATE)} >= 99 %):', 'ok' if gate else 'FAILED'
    )
    record = provenance('train.py') | {
      'steps': int(state.step),
      'digest': encoder.digest,
      'parameters': sum(p.size for p in jax.tree.leaves(trained)),
      'probe': {'trained': scores, 'random': chance},
      'gate': gate,
      'config': self.config.to_dict(),
    }
    write_json(out / PROVENANCE, record)

  def save(self, folder: str | pathlib.Path, params: Params) -> None:
    """Writes an encoder as a Hugging Face T5 folder in bfloat16.

    Args:
      folder: to write.
      params: of the encoder.
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
      self.model.encoder,
      params,
      files={
        VOCABULARY: self.vocabulary,
        'tokenizer_config.json': text.encode(),
      },
      dtype=jnp.bfloat16,
      n_positions=length,
    )

  @classmethod
  def export(cls, request: Export) -> str:
    config = model_folder.load_config(request.workdir)['config']
    experiment = cls(ConfigDict(config))
    params, step = trained_params(request, config)
    experiment.save(request.out, params['encoder'])
    return f'{request.out}: step {step}, {request.described} weights'
