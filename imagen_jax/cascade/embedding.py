"""Embedded prompts, the text that a cascade is conditioned on (Section 2.1)."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from imagen_jax import sharding
from imagen_jax.errors import ModelError
from imagen_jax.io import embeddings, text_folder
from imagen_jax.io.model_folder import StageRecord
from imagen_jax.text import kinds
from imagen_jax.text.encoder import load_text_encoder
from imagen_jax.typing import TextEmb, TextMask


@dataclasses.dataclass(frozen=True)
class Embedding:
  """Prompts with their text embeddings.

  Attributes:
    prompts: the strings.
    text: float32 [N, L, D], zeros at padding.
    mask: bool [N, L], True at tokens.
    cut: how many tokens of each prompt were cut off.
    negative_prompt: what guidance steers away from; '' is the null condition.
    negative: its text [L, D] and mask [L]; None for ''.
  """

  prompts: tuple[str, ...]
  text: TextEmb
  mask: TextMask
  cut: tuple[int, ...]
  negative_prompt: str = ''
  negative: tuple[np.ndarray, np.ndarray] | None = None


def check_kind(path: pathlib.Path, record: StageRecord) -> str:
  """The kind of a stage's text encoder, which is the one in a folder.

  Args:
    path: folder of the encoder.
    record: of the stage; one that names no kind is T5's.

  Raises:
    ModelError: the folder holds another kind.
  """
  kind: str = record.text.get('kind', 't5')
  found = kinds.possible(kinds.read_config(path))
  if kind not in found:
    raise ModelError(
      f'stage {record.name} was trained with a text encoder of kind {kind!r}, '
      f'and {path} holds {" or ".join(map(repr, found)) or "none"}; copy the '
      'one that it was trained with there.'
    )
  return kind


def embed(
  folder: pathlib.PurePath,
  record: StageRecord,
  prompts: Sequence[str],
  negative_prompt: str,
  *,
  mesh_for: Callable[[int], jax.sharding.Mesh],
) -> Embedding:
  """Encodes prompts; the text encoder is loaded for this call only.

  In the precision of training: the encoder's type is that of the stage's
  config, and embeddings are rounded as those that were stored for it.

  Args:
    folder: of the model.
    record: of a stage, which names the encoder and the length.
    prompts, negative_prompt: see `Embedding`.
    mesh_for: bytes of weights -> the mesh to encode on.

  Raises:
    ModelError: the text encoder is missing, damaged, or not the one that the
      stage was trained with.
  """
  path = text_folder.of_stage(folder, record)
  kind = check_kind(path, record)
  files = path.glob('*.safetensors')
  size = sum(file.stat().st_size for file in files if file.is_file())
  mesh = mesh_for(size)
  place = None
  if mesh.shape['fsdp'] > 1:
    place = functools.partial(sharding.leaf_sharding, mesh=mesh)
  dtype = record.config['text']['dtype']
  encoder = load_text_encoder(path, dtype, kind=kind, place=place)
  if encoder.digest != record.text['digest']:
    raise ModelError(
      f'the text encoder in {path} is not the one that stage '
      f'{record.name} was trained with; copy that one there.'
    )
  length = record.text['max_len']
  count = len(prompts)
  every = [*prompts, negative_prompt] if negative_prompt else prompts
  _, _, cut = encoder.tokenize(every, max_len=length)
  text, mask = encoder.encode(every, max_len=length)
  if (store := record.text.get('store')) is not None:
    text = embeddings.rounded(text, store)
  return Embedding(
    tuple(prompts),
    text[:count],
    mask[:count],
    tuple(cut.tolist()),
    negative_prompt,
    (text[-1], mask[-1]) if negative_prompt else None,
  )
