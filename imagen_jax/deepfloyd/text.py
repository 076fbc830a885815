"""Text embeddings for IF, cached on disk.

IF pads every prompt to 77 tokens and masks the padding in T5 only: the U-Nets
attend to the embeddings of the padding. T5-XXL is larger than all of IF's
U-Nets, so it is loaded only for prompts that are not cached, and then freed.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from imagen_jax import sharding
from imagen_jax.cascade import batching
from imagen_jax.errors import ModelError
from imagen_jax.io import files, paths
from imagen_jax.nets.t5 import T5Encoder
from imagen_jax.text import kinds, weights
from imagen_jax.text.tokenizer import load_tokenizer
from imagen_jax.typing import Array, TextEmb, TextMask

Path = str | pathlib.Path
MAX_LEN = 77
BATCH = 4  # prompts per call of T5


def find(folders: Iterable[Path]) -> pathlib.Path:
  """The first of the stages' folders that holds a text encoder.

  Raises:
    ModelError: none does.
  """
  for folder in map(pathlib.Path, folders):
    if (folder / 'text_encoder' / 'config.json').exists():
      return folder
  raise ModelError(
    f'{" and ".join(map(str, folders))} have no text_encoder; copy the '
    'text_encoder and tokenizer folders of IF-I (or t5-v1_1-xxl) into the '
    'first.'
  )


def embed(
  prompts: Sequence[str],
  folder: Path,
  *,
  dtype: str = 'float32',
  cache: Path | None = None,
) -> TextEmb:
  """Embeddings of prompts, padding included.

  Args:
    prompts: list of strings, already cleaned.
    folder: with `text_encoder/` and `tokenizer/` in it.
    dtype: T5's compute dtype, 'float32' or 'bfloat16'; never float16, in which
      T5 overflows.
    cache: a directory of embeddings, read and extended; None: no cache.

  Returns:
    float32 numpy [N, 77, D].

  Raises:
    ModelError: the encoder or its tokenizer is unusable.
  """
  if cache is None:
    found = dict(_encode(dict.fromkeys(prompts), folder, dtype))
    return np.stack([found[prompt] for prompt in prompts])
  kept = Cache(cache, folder, dtype)
  kept.fill(dict.fromkeys(prompts))
  return np.stack([kept.read(prompt) for prompt in prompts])


@dataclasses.dataclass(frozen=True)
class Cache:
  """A directory of embeddings.

  Attributes:
    directory: of the files.
    folder, dtype: of the encoder; see `embed`.
  """

  directory: Path
  folder: Path
  dtype: str

  def fill(self, prompts: Iterable[str]) -> None:
    """Computes the embeddings that it lacks; see `embed`.

    Only one batch of them is in memory at a time.
    """
    directory = paths.check_folder(self.directory, key='text_cache')
    directory.mkdir(parents=True, exist_ok=True)
    missing = [p for p in prompts if not self._file(p).exists()]
    for prompt, value in _encode(missing, self.folder, self.dtype):
      path = self._file(prompt)
      with files.replacing(path) as temporary, temporary.open('wb') as file:
        np.save(file, value, allow_pickle=False)

  def read(self, prompt: str) -> Float[np.ndarray, 'l d']:
    """The embedding of one prompt, [77, D]."""
    return np.load(self._file(prompt), allow_pickle=False)

  def _file(self, prompt: str) -> pathlib.Path:
    encoder = _encoder_key(pathlib.Path(self.folder), self.dtype)
    name = hashlib.sha256(f'{encoder}\n{prompt}'.encode()).hexdigest()[:32]
    return pathlib.Path(self.directory) / f'{name}.npy'


def encoder(folder: pathlib.Path, dtype: str) -> tuple[T5Encoder, dict]:
  """(module, params) of a stage's T5, sharded if one device cannot hold it."""
  path = folder / 'text_encoder'
  size = sum(file.stat().st_size for file in path.glob('*.safetensors'))
  mesh = sharding.sampling_mesh(size)
  config = kinds.read_config(path)
  module = kinds.module_from_config(path, config, dtype=jnp.dtype(dtype))
  if not isinstance(module, T5Encoder):
    raise ModelError(
      f'{path} holds no T5; copy the text_encoder folder of IF-I there.'
    )
  params, _ = weights.load_params(
    path, module, place=functools.partial(sharding.leaf_sharding, mesh=mesh)
  )
  return module, params


def _encode(
  prompts: Iterable[str], folder: Path, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (prompt, [77, D]); T5 is on the device until the last."""
  prompts, folder = list(prompts), pathlib.Path(folder)
  if not prompts:
    return
  tokenizer = load_tokenizer(folder / 'tokenizer')
  module, params = encoder(folder, dtype)
  ids, mask, _ = tokenizer(prompts, MAX_LEN)
  for start in range(0, len(prompts), BATCH):
    rows = slice(start, start + BATCH)
    fill = ((0, BATCH - len(ids[rows])), (0, 0))
    given = np.pad(ids[rows], fill), np.pad(mask[rows], fill)
    out = _apply(module, params, *given)
    yield from zip(prompts[rows], np.asarray(out))
  # Not left to the garbage collector: the U-Net needs the memory now.
  batching.free(params)


@functools.partial(jax.jit, static_argnums=0)
def _apply(
  module: T5Encoder, params: dict, ids: Int[Array, 'b l'], mask: TextMask
) -> TextEmb:
  out: Any = module.apply({'params': params}, ids, mask, keep_padding=True)
  return out


@functools.cache
def _encoder_key(folder: pathlib.Path, dtype: str) -> str:
  """Identifies an encoder, its dtype and `MAX_LEN` in the cache.

  Hashing XXL's weights would take as long as running it, so the config and the
  names and sizes of the weight files identify them.
  """
  path = folder / 'text_encoder'
  config = files.read_json(path / 'config.json', missing=kinds.WHAT)
  sizes = sorted((f.name, f.stat().st_size) for f in path.glob('*.safetensors'))
  return f'{sorted(config.items())}\n{sizes}\n{dtype}\n{MAX_LEN}'


def check_reference(
  folder: Path,
  reference: Path,
  dtype: str = 'bfloat16',
) -> dict[str, float]:
  """Compares T5's embedding of the empty prompt with a reference.

  The public IF repository stores T5-XXL's output for "", its unconditional
  embedding.

  Args:
    folder: with `text_encoder/` and `tokenizer/` in it.
    reference: path of a .npy [77, D].
    dtype: T5's compute dtype.

  Returns:
    {'cosine': least cosine similarity over positions, 'error': root mean
    square error over the reference's root mean square}.

  Raises:
    ModelError: the file is unreadable or has another shape.
  """
  try:
    expected = np.load(reference, allow_pickle=False).astype(np.float64)
  except (OSError, ValueError) as error:
    raise ModelError(
      f'{reference} cannot be read as a .npy array ({error}).'
    ) from error
  got = embed([''], folder, dtype=dtype)[0].astype(np.float64)
  if got.shape != expected.shape:
    raise ModelError(
      f'{reference} has shape {expected.shape} and this encoder gives '
      f'{got.shape}; they belong to different models.'
    )
  norm = lambda x: np.linalg.norm(x, axis=-1)
  cosine = np.sum(got * expected, axis=-1) / (norm(got) * norm(expected))
  rms = lambda x: np.sqrt(np.mean(x**2))
  return {
    'cosine': float(cosine.min()),
    'error': float(rms(got - expected) / rms(expected)),
  }
