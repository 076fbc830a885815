"""The frozen text encoder: prompts -> embeddings and mask (Section 2.1)."""

import collections
import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from imagen_jax import collectives, sharding
from imagen_jax.errors import ModelError, UsageError, check_choice
from imagen_jax.io.files import AnyPath
from imagen_jax.text import kinds, weights
from imagen_jax.text.kinds import TextTower
from imagen_jax.text.tokenizer import Tokenizer, Tokens, load_tokenizer
from imagen_jax.text.weights import Place
from imagen_jax.typing import Array, TextEmb, TextMask

Params: TypeAlias = Mapping[str, Any]

# The paper does not say how many tokens it keeps; 128 cuts no PartiPrompt.
MAX_LEN = 128
SHORTEST = 16  # positions of the first bucket
PARTS = 4  # of a device's captions in a training step, each with its own bucket
IN_FLIGHT = 2  # batches that the devices have, while the host prepares more


@functools.partial(jax.jit, static_argnums=0)
def encode_tokens(
  module: TextTower, params: Params, ids: Int[Array, 'b l'], mask: TextMask
) -> TextEmb:
  """Embeds tokens, also inside a jitted training step.

  Args:
    module: the network.
    params: its parameters.
    ids: [B, L] int32.
    mask: [B, L] bool, False at padding.

  Returns:
    [B, L, D] float32, exact zeros at padding.
  """
  emb: Any = module.apply({'params': params}, ids, mask)
  return emb


def buckets(max_len: int) -> list[int]:
  """The lengths to which captions are padded: 16, 32, 64, … and `max_len`."""
  doubled = (SHORTEST << i for i in range(max_len.bit_length()))
  return [*(size for size in doubled if size < max_len), max_len]


def encode_by_length(
  module: TextTower, params: Params, ids: Int[Array, 'b l'], mask: TextMask
) -> tuple[TextEmb, Float[Array, ' buckets']]:
  """`encode_tokens` in a training step, with little work on padding.

  Each device sorts its captions by length and encodes them in up to `PARTS`
  equal parts. A part has the positions of the bucket of its longest caption, on
  any device: all take the same branch, and can share the parameters.

  Args:
    module, params, ids, mask: see `encode_tokens`.

  Returns:
    [B, L, D] float32, equal to `encode_tokens` up to rounding; and the fraction
    of the captions that was encoded in each of `buckets(L)`.
  """
  length, sizes = ids.shape[1], buckets(ids.shape[1])
  if len(sizes) == 1:
    return encode_tokens(module, params, ids, mask), jnp.ones(1)

  def sort(ids: Array, mask: Array) -> tuple[jax.Array, ...]:
    """A device's rows as [parts, rows / parts, …], and their order."""
    order = jnp.argsort(_longest(mask))
    parts = math.gcd(len(ids), PARTS)
    split = lambda x: x[order].reshape(parts, -1, *x.shape[1:])
    return split(ids), split(mask), order

  def unsort(order: Array, emb: Array) -> jax.Array:
    return emb.reshape(-1, *emb.shape[2:])[jnp.argsort(order)]

  def encode(size: int, ids: Array, mask: Array) -> jax.Array:
    emb = encode_tokens(module, params, ids[:, :size], mask[:, :size])
    return jnp.pad(emb, ((0, 0), (0, length - size), (0, 0)))

  def part(given: tuple[Array, Array]) -> tuple[jax.Array, jax.Array]:
    ids, mask = map(collectives.constrain_batch, given)
    bucket = jnp.sum(_longest(mask).max() > jnp.array(sizes[:-1]))
    branches = [functools.partial(encode, size) for size in sizes]
    emb = jax.lax.switch(bucket, branches, ids, mask)
    return collectives.constrain_batch(emb), jax.nn.one_hot(bucket, len(sizes))

  *given, order = collectives.per_device(sort, (0, 0), (1, 1, 0))(ids, mask)
  emb, ran = jax.lax.map(part, tuple(given))
  return collectives.per_device(unsort, (0, 1), 0)(order, emb), ran.mean(axis=0)


def _longest(mask: Array) -> Any:
  """[B]: the positions up to the last token of each row."""
  return (mask * np.arange(1, mask.shape[1] + 1)).max(axis=1)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """A frozen T5, CLIP or BERT with its tokenizer.

  Attributes:
    module: the network.
    params: its parameters, on the devices.
    tokenizer: the `Tokenizer`.
    dim: D, width of the embeddings.
    max_len: L, the default number of positions.
    digest: sha256 over hyper-parameters, weights and vocabulary: a stage can
      only be used with the encoder it was trained with.
    kind: one of `kinds.KINDS`.
  """

  module: TextTower
  params: Params
  tokenizer: Tokenizer
  dim: int
  max_len: int
  digest: str
  kind: str = 't5'

  def tokenize(
    self, prompts: Sequence[str], *, max_len: int | None = None
  ) -> Tokens:
    """See `Tokenizer.__call__`; returns (ids, mask, cut).

    Raises:
      UsageError: see `check_max_len`.
    """
    length = max_len or self.max_len
    check_max_len(length, self.tokenizer, self.module)
    return self.tokenizer(prompts, length)

  def encode(
    self,
    prompts: Sequence[str],
    *,
    max_len: int | None = None,
    batch_size: int = 8,
  ) -> tuple[Float[np.ndarray, 'b l d'], Bool[np.ndarray, 'b l']]:
    """Embeds prompts; padding is not computed, see `ragged`.

    Args:
      prompts: list of B strings.
      max_len: L, None for the encoder's own.
      batch_size: prompts per call of the network.

    Returns:
      (emb [B, L, D] float32, zeros at padding; mask [B, L] bool), NumPy.
    """
    ids, mask, _ = self.tokenize(prompts, max_len=max_len)
    emb = np.zeros((*ids.shape, self.dim), np.float32)
    for row, short in self.encode_tokens(ids, mask, lambda size: batch_size):
      emb[row, : len(short)] = short
    return emb, mask

  def encode_tokens(
    self,
    ids: Int[np.ndarray, 'b l'],
    mask: Bool[np.ndarray, 'b l'],
    batch_size: Callable[[int], int],
  ) -> Iterator[tuple[int, Float[np.ndarray, 'n d']]]:
    """Embeds tokens, those of a bucket together, on all devices of `params`.

    A bucket's last batch is padded. So there is one program a bucket, and a
    prompt's embedding does not depend on the other prompts.

    Args:
      ids, mask: from `tokenize`.
      batch_size: positions -> prompts of so many per call of the network,
        rounded up to a multiple of the devices.

    Yields:
      (index of a prompt, its embedding up to the last token, float32), in any
      order.
    """
    mesh = sharding.mesh_of(self.params)
    devices = 1 if mesh is None else mesh.size
    running: collections.deque[tuple[np.ndarray, jax.Array]] = (
      collections.deque()
    )
    longest, least = _longest(mask), 0

    def done() -> Iterator[tuple[int, np.ndarray]]:
      rows, out = running.popleft()
      yield from zip(rows.tolist(), sharding.fetch(out))

    for size in buckets(ids.shape[1]):
      chosen = np.flatnonzero((longest >= least) & (longest <= size))
      least = size + 1
      count = -(-batch_size(size) // devices) * devices
      for start in range(0, len(chosen), count):
        rows = chosen[start : start + count]
        fill = (0, count - len(rows)), (0, 0)
        arrays = [np.pad(x[rows, :size], fill) for x in (ids, mask)]
        running.append((rows, self._encode(arrays, mesh)))
        if len(running) > IN_FLIGHT:
          yield from done()
    while running:
      yield from done()

  def _encode(
    self, arrays: Sequence[np.ndarray], mesh: jax.sharding.Mesh | None
  ) -> jax.Array:
    """A batch's embeddings, still being computed."""
    if mesh is None:
      return encode_tokens(self.module, self.params, *arrays)
    arrays = sharding.put_whole_batch(arrays, mesh)
    with jax.set_mesh(mesh):
      return encode_tokens(self.module, self.params, *arrays)


def load_text_encoder(
  path: AnyPath,
  dtype: str = 'float32',
  *,
  kind: str | None = None,
  max_len: int | None = None,
  place: Place | None = None,
) -> TextEncoder:
  """Loads a T5, CLIP or BERT in Hugging Face layout.

  Args:
    path: folder with `config.json`, safetensors and a tokenizer, such as
      t5-v1_1-xxl or the demo's.
    dtype: 'float32', or 'bfloat16' for matrices and their products (half the
      memory; the residual stream, norms and softmax stay float32).
    kind: one of `kinds.KINDS` that it must be; None: what its config says.
    max_len: positions of a prompt; None is 128, or the folder's
      `model_max_length` or what the network takes if that is less.
    place: gives the sharding of each parameter, see `weights.load_params`;
      with it, the host holds at most one tensor at a time.

  Raises:
    ModelError: the folder is not a usable encoder; the message names file and
      key.
    UsageError: unknown dtype, another kind than asked, or max_len has no room
      for a token or is more than the network takes.
  """
  path = pathlib.Path(path)
  types = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
  check_choice("the text encoder's dtype", dtype, types)
  config = kinds.read_config(path)
  kind = kinds.recognise(path, config, kind)
  module = kinds.module_from_config(path, config, kind=kind, dtype=types[dtype])
  tokenizer = load_tokenizer(path)
  # The size of a tokenizer.json includes <extra_id_…>; in real models these
  # are below vocab_size too.
  if tokenizer.size > module.vocab_size:
    raise ModelError(
      f'{path} has a tokenizer of {tokenizer.size} pieces and vocab_size '
      f'{module.vocab_size}; they belong to different models.'
    )
  if max_len is None:
    limit = min(kinds.max_positions(module), kinds.model_max_length(path))
    max_len = int(min(MAX_LEN, limit))
  check_max_len(max_len, tokenizer, module)
  params, digest = weights.load_params(path, module, place=place)
  whole = f'{_sizes(module)}\n{digest}\n{tokenizer.digest}'
  return TextEncoder(
    module=module,
    params=params,
    tokenizer=tokenizer,
    dim=module.width,
    max_len=max_len,
    digest=hashlib.sha256(whole.encode()).hexdigest(),
    kind=kind,
  )


def find_mark(path: AnyPath, kind: str | None = None) -> str:
  """A digest that tells encoders apart without reading their matrices.

  Args:
    path, kind: see `load_text_encoder`.

  Returns:
    sha256 over the hyper-parameters, the vocabulary and the small tensors,
    such as the norms, which no two training runs share.

  Raises:
    ModelError, UsageError: as `load_text_encoder`.
  """
  path = pathlib.Path(path)
  config = kinds.read_config(path)
  module = kinds.module_from_config(path, config, kind=kind)
  small = weights.digest_small(path, module)
  whole = f'{_sizes(module)}\n{small}\n{load_tokenizer(path).digest}'
  return hashlib.sha256(whole.encode()).hexdigest()


def _sizes(module: TextTower) -> list[tuple[str, Any]]:
  """The hyper-parameters of a network, sorted by name."""
  fields = dataclasses.fields(module)
  apart = ('dtype', 'name', 'parent')
  return sorted(
    (f.name, getattr(module, f.name)) for f in fields if f.name not in apart
  )


def check_max_len(
  max_len: int, tokenizer: Tokenizer | None, module: TextTower
) -> None:
  """Rejects a length that has no room for a token, or too many positions.

  Args:
    max_len: positions of a caption.
    tokenizer: adds special tokens; None where it is not at hand.
    module: the network.

  Raises:
    UsageError: naming the lengths that fit.
  """
  limit = kinds.max_positions(module)
  special = tokenizer.start + tokenizer.end if tokenizer else ()
  least = len(special) + 1
  if not least <= max_len <= limit:
    most = f'at most {limit}' if max_len > limit else f'at least {least}'
    raise UsageError(
      f'text.max_len is {max_len}; this text encoder takes {most} tokens, '
      'special ones included.',
      key='config.text.max_len',
    )
