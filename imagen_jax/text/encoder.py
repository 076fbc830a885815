"""The frozen text encoder: prompts -> embeddings and mask (Section 2.1)."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from imagen_jax import sharding
from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io.files import AnyPath
from imagen_jax.text import kinds, weights
from imagen_jax.text.kinds import TextTower
from imagen_jax.text.tokenizer import Tokenizer, Tokens, load_tokenizer
from imagen_jax.text.weights import Place
from imagen_jax.typing import Array, TextEmb, TextMask

Params: TypeAlias = Mapping[str, Any]

# The paper does not say how many tokens it keeps; 128 cuts no PartiPrompt.
MAX_LEN = 128


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
    """Embeds prompts, `batch_size` at a time.

    The last batch is padded, so that only one program is compiled and a
    prompt's embedding does not depend on the other prompts.

    Args:
      prompts: list of B strings.
      max_len: L, None for the encoder's own.
      batch_size: prompts per call of the network.

    Returns:
      (emb [B, L, D] float32, zeros at padding; mask [B, L] bool), NumPy.
    """
    ids, mask, _ = self.tokenize(prompts, max_len=max_len)
    emb = np.zeros((*ids.shape, self.dim), np.float32)
    for start in range(0, len(prompts), batch_size):
      rows = slice(start, start + batch_size)
      count = len(ids[rows])
      fill = ((0, batch_size - count), (0, 0))
      padded = [np.pad(array[rows], fill) for array in (ids, mask)]
      out = encode_tokens(self.module, self.params, *padded)
      emb[rows] = sharding.fetch(out)[:count]
    return emb, mask


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
  if dtype not in types:
    raise UsageError(
      f'text encoder dtype {dtype!r} is unknown; choose float32 or bfloat16.'
    )
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
  sizes = {
    field.name: getattr(module, field.name)
    for field in dataclasses.fields(module)
    if field.name not in ('dtype', 'name', 'parent')
  }
  whole = f'{sorted(sizes.items())}\n{digest}\n{tokenizer.digest}'
  return TextEncoder(
    module=module,
    params=params,
    tokenizer=tokenizer,
    dim=module.width,
    max_len=max_len,
    digest=hashlib.sha256(whole.encode()).hexdigest(),
    kind=kind,
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
