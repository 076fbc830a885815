"""Embeddings as bytes: the tokens of captions, rounded, without padding.

A record holds the captions of one image: their number and the number of tokens
of each, as 32-bit integers, then their tokens. In bfloat16 a caption is
[tokens, dim]. In int8 it is a float32 scale per token, then [tokens, dim]: a
value is its token's scale times a whole number in [−127, 127].
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int8

STORES = ('bfloat16', 'int8')
# Bytes of a number, on average.
BYTES = {'bfloat16': 2, 'int8': 1}
COUNT, SCALE = np.dtype('<u4'), np.dtype('<f4')
Rows = Float[np.ndarray, 'tokens dim']


def pack_caption(rows: Rows, store: str) -> tuple[int, bytes]:
  """(number of tokens, bytes) of one caption's embedding.

  Args:
    rows: float32.
    store: one of `STORES`.
  """
  if store == 'bfloat16':
    return len(rows), rows.astype(ml_dtypes.bfloat16).tobytes()
  whole, scale = _quantized(rows)
  return len(rows), scale.astype(SCALE).tobytes() + whole.tobytes()


def pack(captions: Sequence[tuple[int, bytes]]) -> bytes:
  """The record of an image, from what `pack_caption` returns for each."""
  counts = [len(captions), *(tokens for tokens, _ in captions)]
  head = np.array(counts, COUNT).tobytes()
  return head + b''.join(data for _, data in captions)


def unpack(record: bytes, dim: int, store: str) -> list[Rows]:
  """The bfloat16 embeddings of each caption of a record.

  Raises:
    ValueError: the record is damaged.
  """
  (number,) = np.frombuffer(record, COUNT, 1)
  counts = np.frombuffer(record, COUNT, number, offset=COUNT.itemsize)
  place, found = COUNT.itemsize * (1 + int(number)), []
  for tokens in counts.tolist():
    scale = None
    if store == 'int8':
      scale = np.frombuffer(record, SCALE, tokens, offset=place)
      place += scale.nbytes
    kind = np.dtype(np.int8 if store == 'int8' else ml_dtypes.bfloat16)
    rows = np.frombuffer(record, kind, tokens * dim, offset=place)
    place += rows.nbytes
    rows = rows.reshape(tokens, dim)
    found.append(rows if scale is None else _restored(rows, scale))
  if place != len(record):
    raise ValueError('its length is wrong')
  return found


def rounded(emb: Float[np.ndarray, '*b dim'], store: str) -> np.ndarray:
  """Embeddings as training reads them from a store: float32, rounded."""
  if store == 'int8':
    emb = _restored(*_quantized(emb))
  return emb.astype(ml_dtypes.bfloat16).astype(np.float32)


def _quantized(
  rows: Float[np.ndarray, '*b dim'],
) -> tuple[Int8[np.ndarray, '*b dim'], Float[np.ndarray, '*b']]:
  scale = np.abs(rows).max(axis=-1, initial=0) / np.float32(127)
  divisor = np.where(scale > 0, scale, 1)[..., None]
  return np.rint(rows / divisor).astype(np.int8), scale


def _restored(
  whole: Int8[np.ndarray, '*b dim'], scale: Float[np.ndarray, '*b']
) -> Float[np.ndarray, '*b dim']:
  return (whole * scale[..., None]).astype(ml_dtypes.bfloat16)
