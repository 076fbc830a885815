"""CLIP's tokenizer, for the CLIP score (Section 4.1)."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from imagen_jax.errors import ModelError
from imagen_jax.io.files import AnyPath


def load(folder: AnyPath, length: int) -> Callable[[Sequence[str]], np.ndarray]:
  """Loads a function from N sentences to int32 ids [N, length].

  Longer sentences are truncated; the end token is kept.

  Raises:
    ModelError: the folder has no tokenizer.
  """
  from transformers import CLIPTokenizer  # slow to import: only here

  folder = pathlib.Path(folder)
  files = ('tokenizer.json',), ('vocab.json', 'merges.txt')
  if not any(all((folder / f).exists() for f in group) for group in files):
    raise ModelError(
      f'{folder} holds no CLIP tokenizer: put vocab.json and merges.txt, or '
      'tokenizer.json, beside its weights.'
    )
  try:
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
  except Exception as error:  # each library raises its own
    raise ModelError(
      f'the tokenizer in {folder} cannot be read ({error}); copy it again.'
    ) from None

  def tokenize(prompts: Sequence[str]) -> np.ndarray:
    ids = tokenizer(
      list(prompts), padding='max_length', truncation=True, max_length=length
    )
    return np.asarray(ids['input_ids'], np.int32)

  return tokenize
