"""The kinds of text encoder, each recognised by its folder's config.json.

The paper compares T5, BERT and CLIP (Section 2.1, Appendix D.1).
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax.typing import DTypeLike

from imagen_jax.errors import ModelError, UsageError
from imagen_jax.io import hub_folder
from imagen_jax.io.files import AnyPath, read_json
from imagen_jax.nets.bert import Bert
from imagen_jax.nets.clip import ClipText
from imagen_jax.nets.t5 import T5Encoder
from imagen_jax.nets.t5gemma import T5Gemma
from imagen_jax.nets.tower import ACTIVATIONS

TextTower: TypeAlias = T5Encoder | T5Gemma | ClipText | Bert

WHAT = (
  'a text encoder is a folder in Hugging Face layout: config.json, '
  'model.safetensors and its tokenizer, such as spiece.model'
)


@dataclasses.dataclass(frozen=True)
class Kind:
  """How a kind of encoder lies in Hugging Face folders.

  Attributes:
    module: its class.
    model_types: of its `config.json`.
    keys: {attribute of the module: key of config.json}, where they differ.
    defaults: of keys that a config.json may leave out; None: of all of them,
      the module's.
    section: the part of config.json for the text, if it has one.
    fixed: further attributes of the module.
    ignored: pattern of tensors that it does not use.
    renamed: (pattern, replacement) of tensors' other names.
  """

  module: type[TextTower]
  model_types: tuple[str, ...]
  keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] | None = None
  section: str | None = None
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignored: str = r'(?!)'
  renamed: tuple[tuple[str, str], ...] = ()

  def tensor(self, name: str) -> str | None:
    """The module's name of a file's tensor; None if it does not use it."""
    if re.match(self.ignored, name):
      return None
    for pattern, replacement in self.renamed:
      name = re.sub(pattern, replacement, name)
    return name


# {attribute of `T5Encoder`: key of config.json}.
T5_KEYS = {
  'vocab_size': 'vocab_size',
  'width': 'd_model',
  'num_layers': 'num_layers',
  'num_heads': 'num_heads',
  'head_dim': 'd_kv',
  'mlp_dim': 'd_ff',
  'num_buckets': 'relative_attention_num_buckets',
  'max_distance': 'relative_attention_max_distance',
  'epsilon': 'layer_norm_epsilon',
  'gated': 'feed_forward_proj',
}
# {key: its only supported value} of all kinds.
ENCODERS = {
  'is_decoder': False,
  'position_embedding_type': 'absolute',
  'rope_type': 'default',
}
HEADS = 'num_attention_heads'
# Of feed_forward_proj: T5 v1.0; v1.1 and Flan.
GATED = {'relu': False, 'gated-gelu': True}

CLIP = Kind(
  ClipText,
  ('clip', 'clip_text_model'),
  section='text_config',
  fixed={'penultimate': False},
  ignored=r'vision_model\.|visual_projection|text_projection|logit_scale'
  r'|.*\.position_ids$',
  renamed=((r'^(?!text_model\.)', 'text_model.'),),
)
KINDS = {
  't5': Kind(
    T5Encoder,
    ('t5', 'mt5'),
    keys=T5_KEYS,
    # Of the keys that T5 v1.0 leaves out.
    defaults={
      'num_buckets': 32,
      'max_distance': 128,
      'epsilon': 1e-6,
      'gated': 'relu',
    },
    # A full T5 also has a decoder, which Imagen does not use.
    ignored=r'decoder\.|lm_head\.',
    renamed=((r'^encoder\.embed_tokens\.weight$', 'shared.weight'),),
  ),
  't5gemma': Kind(
    T5Gemma,
    ('t5gemma',),
    keys={
      'hidden_act': 'hidden_activation',
      'layer_norm_eps': 'rms_norm_eps',
      'max_position_embeddings': 'sliding_window',
    },
    section='encoder',
    ignored=r'(model\.)?decoder\.|lm_head\.',
    renamed=((r'^model\.', ''),),
  ),
  'clip': CLIP,
  # The layer before the last, as in the paper's comparison (D.1).
  'clip_penultimate': dataclasses.replace(CLIP, fixed={'penultimate': True}),
  'bert': Kind(
    Bert,
    ('bert',),
    ignored=r'cls\.|(bert\.)?pooler\.|.*\.position_ids$',
    renamed=(
      (r'^bert\.', ''),
      (r'LayerNorm\.gamma$', 'LayerNorm.weight'),
      (r'LayerNorm\.beta$', 'LayerNorm.bias'),
    ),
  ),
}


def read_config(folder: AnyPath) -> dict[str, Any]:
  """Reads a folder's `config.json`.

  Raises:
    ModelError: the file is missing or not JSON.
  """
  path = pathlib.Path(folder) / 'config.json'
  return read_json(path, advice=hub_folder.AGAIN, missing=WHAT)


def possible(config: Mapping[str, Any]) -> list[str]:
  """The kinds that an encoder with this config.json can be used as."""
  stated = config.get('model_type', 't5')
  return [name for name, kind in KINDS.items() if stated in kind.model_types]


def recognise(
  folder: AnyPath, config: Mapping[str, Any], kind: str | None = None
) -> str:
  """The kind of encoder in a folder, one of `KINDS`.

  Args:
    folder: where the config is from, for error messages.
    config: `read_config(folder)`.
    kind: the kind that it should be; None for what its model_type says.

  Raises:
    ModelError: the folder holds none of `KINDS`.
    UsageError: it holds another kind than asked, or there is no such kind.
  """
  if kind is not None and kind not in KINDS:
    raise UsageError(
      f'text.kind is {kind!r}; it can be {", ".join(KINDS)}, or None for what '
      "the encoder's config.json says.",
      key='config.text.kind',
    )
  found = possible(config)
  if not found:
    raise ModelError(
      f'{pathlib.Path(folder) / "config.json"} has model_type '
      f'{config["model_type"]!r}, '
      f'which is no text encoder known here ({", ".join(KINDS)}); give the '
      'folder of a T5 such as google/t5-v1_1-xxl, or of a BERT or CLIP.'
    )
  if kind is not None and kind not in found:
    raise UsageError(
      f'text.kind is {kind!r}, and {folder} holds an encoder of kind '
      f'{found[0]!r}; leave text.kind out, or give the folder of another.',
      key='config.text.kind',
    )
  return kind or found[0]


def module_from_config(
  folder: AnyPath,
  config: Mapping[str, Any],
  *,
  kind: str | None = None,
  dtype: DTypeLike = jnp.float32,
) -> TextTower:
  """The network that a Hugging Face `config.json` describes.

  Args:
    folder: where the config is from, for error messages.
    config: `read_config(folder)`.
    kind: see `recognise`.
    dtype: the module's.

  Raises:
    ModelError: it does not describe a supported encoder.
    UsageError: see `recognise`.
  """
  path = pathlib.Path(folder) / 'config.json'
  row = KINDS[recognise(folder, config, kind)]
  if isinstance(part := config.get(row.section or ''), dict):
    config = part
  if isinstance(rotary := config.get('rope_parameters'), dict):
    config = {**config, **rotary}
  fields = _fields(path, config, row, {*row.fixed, 'dtype', 'name', 'parent'})
  fields |= row.fixed
  for key, value in ENCODERS.items():
    if (found := config.get(key, value)) != value:
      raise ModelError(
        f'{path} has {key} = {found!r}; only {value!r} is supported.'
      )
  width, heads = fields.get('hidden_size', 1), fields.get(HEADS, 1)
  if width % heads or heads % fields.get('num_key_value_heads', 1):
    raise ModelError(
      f'{path} has {HEADS} = {heads}, which does not fit its other sizes; '
      f'{hub_folder.AGAIN}.'
    )
  made: Any = row.module
  return made(**fields, dtype=dtype)


def _fields(
  path: pathlib.Path, config: Mapping[str, Any], row: Kind, others: set[str]
) -> dict[str, Any]:
  """A module's attributes, checked, except `others`."""
  found = {}
  for field in dataclasses.fields(row.module):
    if field.name in others:
      continue
    key = row.keys.get(field.name, field.name)
    default = field.default
    if row.defaults is not None:
      default = row.defaults.get(field.name)
    value = config.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if field.type is int:
      good = number and isinstance(value, int) and 0 < value < 2**31
      wanted = 'a whole number above 0'
    elif field.type is float:
      good, wanted = number and 0 < value < math.inf, 'a number above 0'
    else:
      names = [*(GATED if field.name == 'gated' else ACTIVATIONS)]
      good, wanted = value in names, ' or '.join(names)
    if not good:
      raise ModelError(
        f'{path} has {key} = {value!r}; this encoder needs {wanted} there.'
      )
    found[field.name] = GATED[value] if field.name == 'gated' else value
  return found


def max_positions(module: TextTower) -> float:
  """The most tokens that an encoder takes; T5 has no limit."""
  if isinstance(module, T5Encoder):
    return math.inf
  return module.max_position_embeddings


def model_max_length(folder: AnyPath) -> float:
  """`model_max_length` of a folder's `tokenizer_config.json`, or infinity."""
  path = pathlib.Path(folder) / 'tokenizer_config.json'
  if not path.exists():
    return math.inf
  length = read_json(path).get('model_max_length') or math.inf
  if not isinstance(length, int | float) or not length >= 2:
    raise ModelError(
      f'{path} has model_max_length = {length!r}; a tokenizer has a number '
      f'there, or none; {hub_folder.AGAIN}.'
    )
  return length
