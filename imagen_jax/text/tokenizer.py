"""Captions to token ids: special tokens around the pieces, then padding."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Bool, Int32

from imagen_jax.errors import ModelError
from imagen_jax.io.files import AnyPath, read_json

VOCABULARY = 'spiece.model'
FAST = 'tokenizer.json'
# {vocabulary: further files} of folders without a `tokenizer.json`.
OLD = {'vocab.txt': ('tokenizer_config.json',), 'vocab.json': ('merges.txt',)}
PAD, EOS = 0, 1  # T5's
# (ids, mask, tokens cut off).
Tokens: TypeAlias = tuple[
  Int32[np.ndarray, 'b l'], Bool[np.ndarray, 'b l'], Int32[np.ndarray, ' b']
]


class Tokenizer:
  """The tokenizer of a T5, BERT or CLIP; picklable, for data workers.

  Attributes:
    size: number of pieces; every id is smaller.
    start, end: ids before and after the pieces: T5's </s>, BERT's [CLS] and
      [SEP], CLIP's start and end.
    pad: the id at padding.
    digest: sha256 of the vocabulary's file.
  """

  def __init__(self, path: AnyPath) -> None:
    """Reads a vocabulary: one of the files that `load_tokenizer` looks for.

    Raises:
      ModelError: the file is damaged.
    """
    path = pathlib.Path(path)
    try:
      self.digest = _digest(path)
      self._pieces: _Fast | _Pieces = (
        _Pieces(path.read_bytes()) if path.name == VOCABULARY else _Fast(path)
      )
    except Exception as error:  # each library raises its own
      raise ModelError(
        f'{path} cannot be read as a vocabulary ({error}); download it again.'
      ) from None
    self.size, self.pad = self._pieces.size, self._pieces.pad
    self.start, self.end = self._pieces.start, self._pieces.end

  def __call__(self, prompts: Sequence[str], max_len: int) -> Tokens:
    """Token ids of a list of prompts.

    Args:
      prompts: list of B strings.
      max_len: L, the positions of a row, special tokens included.

    Returns:
      (ids [B, L] int32, `pad` at padding; mask [B, L] bool, True at tokens,
      special ones included; cut [B] int32, how many tokens of each prompt were
      cut off).
    """
    ids = np.full((len(prompts), max_len), self.pad, np.int32)
    mask = np.zeros((len(prompts), max_len), bool)
    cut = np.zeros(len(prompts), np.int32)
    room = max_len - len(self.start) - len(self.end)
    for row, prompt in enumerate(prompts):
      pieces = self.pieces(prompt)
      kept = [*self.start, *pieces[:room], *self.end]
      ids[row, : len(kept)] = kept
      mask[row, : len(kept)] = True
      cut[row] = max(0, len(pieces) - room)
    return ids, mask, cut

  def pieces(self, prompt: str) -> list[int]:
    """The ids of one prompt, without special tokens."""
    return self._pieces(prompt)


class _Pieces:
  """T5's sentencepiece."""

  start, end, pad = (), (EOS,), PAD

  def __init__(self, data: bytes) -> None:
    self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
    self.size = self._model.vocab_size()
    special = self._model.pad_id(), self._model.eos_id()
    if special != (PAD, EOS):
      raise ValueError(f'<pad>, </s> are {special}, not {PAD, EOS}')

  def __call__(self, prompt: str) -> list[int]:
    return self._model.encode(prompt)


class _Fast:
  """A `tokenizer.json`, or what transformers makes of older files."""

  def __init__(self, path: pathlib.Path) -> None:
    self._model = _converted(path)
    padding = self._model.padding
    self._model.no_truncation()
    self._model.no_padding()
    self.size = 1 + max(self._model.get_vocab().values())
    example = self._model.encode('a')
    special = example.special_tokens_mask
    pieces = special.index(0), len(special) - special[::-1].index(0)
    self.start: tuple[int, ...] = tuple(example.ids[: pieces[0]])
    self.end: tuple[int, ...] = tuple(example.ids[pieces[1] :])
    if not self.start + self.end:
      raise ValueError('it adds no special tokens')
    named = [self._model.token_to_id(name) for name in _pads(path.parent)]
    known = [i for i in named if i is not None]
    last = padding['pad_id'] if padding else (self.end or self.start)[-1]
    self.pad: int = known[0] if known else last

  def __call__(self, prompt: str) -> list[int]:
    return self._model.encode(prompt, add_special_tokens=False).ids


def _converted(path: pathlib.Path) -> tokenizers.Tokenizer:
  if path.name == FAST:
    return tokenizers.Tokenizer.from_file(str(path))
  import transformers  # slow to import: only here

  made: Any = (
    transformers.BertTokenizer
    if path.name == 'vocab.txt'
    else transformers.CLIPTokenizer
  )
  return made.from_pretrained(path.parent, local_files_only=True)._tokenizer


def _pads(folder: pathlib.Path) -> list[str]:
  """Names that the padding may have, the first known one counts."""
  found = []
  for file in ('tokenizer_config.json', 'special_tokens_map.json'):
    if (folder / file).exists():
      name = read_json(folder / file).get('pad_token')
      found.append(name['content'] if isinstance(name, dict) else name)
  return [*filter(None, found), '[PAD]', '<pad>']


def _digest(path: pathlib.Path) -> str:
  files = [path, *(path.parent / name for name in OLD.get(path.name, ()))]
  # Without its merges, byte pairs cannot be read.
  found = [f for f in files if f.exists() or f.name == 'merges.txt']
  return hashlib.sha256(b''.join(f.read_bytes() for f in found)).hexdigest()


def load_tokenizer(folder: AnyPath) -> Tokenizer:
  """The `Tokenizer` of a Hugging Face folder.

  Raises:
    ModelError: the folder has no tokenizer, or a damaged one.
  """
  for name in (VOCABULARY, FAST, *OLD):
    if (pathlib.Path(folder) / name).exists():
      return Tokenizer(pathlib.Path(folder) / name)
  raise ModelError(
    f'{folder} holds no tokenizer ({VOCABULARY}, {FAST}, vocab.txt, or '
    'vocab.json with merges.txt); copy that of this text encoder into its '
    'folder.'
  )
