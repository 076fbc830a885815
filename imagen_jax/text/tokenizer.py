"""T5's tokenizer: sentencepiece ids, then </s>, then padding."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int32

from imagen_jax.errors import ModelError
from imagen_jax.io.files import AnyPath

VOCABULARY = 'spiece.model'
FAST = 'tokenizer.json'
PAD, EOS = 0, 1
# (ids, mask, tokens cut off).
Tokens: TypeAlias = tuple[
  Int32[np.ndarray, 'b l'], Bool[np.ndarray, 'b l'], Int32[np.ndarray, ' b']
]


class Tokenizer:
  """T5's tokenizer; picklable, for data workers.

  Attributes:
    size: number of pieces; every id is smaller.
    digest: sha256 of the vocabulary file.
  """

  def __init__(self, path: AnyPath) -> None:
    """Reads a `spiece.model`, or a `tokenizer.json` where only that exists.

    Raises:
      ModelError: the file is damaged.
    """
    path = pathlib.Path(path)
    try:
      data = path.read_bytes()
      self._pieces: _Fast | _Pieces = (
        _Fast(path) if path.name == FAST else _Pieces(data)
      )
    except Exception as error:  # each library raises its own
      raise ModelError(
        f'{path} cannot be read as a T5 vocabulary ({error}); download it '
        'again.'
      ) from None
    self.digest = hashlib.sha256(data).hexdigest()
    self.size = self._pieces.size

  def __call__(self, prompts: Sequence[str], max_len: int) -> Tokens:
    """Token ids of a list of prompts.

    Args:
      prompts: list of B strings.
      max_len: L, the positions of a row; </s> takes one of them.

    Returns:
      (ids [B, L] int32, 0 at padding; mask [B, L] bool, True at tokens and at
      </s>; cut [B] int32, how many tokens of each prompt were cut off).
    """
    ids = np.full((len(prompts), max_len), PAD, np.int32)
    mask = np.zeros((len(prompts), max_len), bool)
    cut = np.zeros(len(prompts), np.int32)
    for row, prompt in enumerate(prompts):
      pieces = self.pieces(prompt)
      kept = [*pieces[: max_len - 1], EOS]
      ids[row, : len(kept)] = kept
      mask[row, : len(kept)] = True
      cut[row] = len(pieces) + 1 - len(kept)
    return ids, mask, cut

  def pieces(self, prompt: str) -> list[int]:
    """The ids of one prompt, without </s>."""
    return self._pieces(prompt)


class _Pieces:
  """sentencepiece, which imports 20 times faster than transformers."""

  def __init__(self, data: bytes) -> None:
    self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
    self.size = self._model.vocab_size()
    special = self._model.pad_id(), self._model.eos_id()
    if special != (PAD, EOS):
      raise ValueError(f'<pad>, </s> are {special}, not {PAD, EOS}')

  def __call__(self, prompt: str) -> list[int]:
    return self._model.encode(prompt)


class _Fast:
  """The tokenizer of a folder that has only a `tokenizer.json`."""

  def __init__(self, path: pathlib.Path) -> None:
    from transformers import AutoTokenizer  # slow to import: only here

    self._model = AutoTokenizer.from_pretrained(
      path.parent, local_files_only=True
    )
    self.size = len(self._model)
    if (self._model.pad_token_id, self._model.eos_token_id) != (PAD, EOS):
      raise ValueError('<pad> and </s> are not 0 and 1')

  def __call__(self, prompt: str) -> list[int]:
    return self._model.encode(prompt, add_special_tokens=False)


def load_tokenizer(folder: AnyPath) -> Tokenizer:
  """The `Tokenizer` of a Hugging Face folder.

  Raises:
    ModelError: the folder has no tokenizer, or a damaged one.
  """
  for name in (VOCABULARY, FAST):
    if (pathlib.Path(folder) / name).exists():
      return Tokenizer(pathlib.Path(folder) / name)
  raise ModelError(
    f'{folder} holds neither {VOCABULARY} nor {FAST}; copy the tokenizer of '
    'this text encoder into its folder.'
  )
