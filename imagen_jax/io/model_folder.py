"""A finished model on disk: JSON and safetensors, one directory per stage.

  model/base/stage.json            shapes, config, digests, provenance
  model/base/weights.safetensors   'down_0/blocks/conv1/kernel', …
  model/sr1/…
  model/text/                      the text encoder, in Hugging Face layout

A stage can also be a training workdir (`config.json` and `checkpoints/`);
then the EMA of its newest good checkpoint is used. Reading executes nothing, so
an untrusted model folder is safe to open.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from imagen_jax.errors import ModelError, UsageError, check_choice
from imagen_jax.io import bucket, files, safetensors
from imagen_jax.io.embeddings import STORES
from imagen_jax.io.files import AnyPath
from imagen_jax.io.safetensors import Tensor

if TYPE_CHECKING:
  from imagen_jax.io.checkpoint import Checkpoints


FORMAT_VERSION = 2
MAX_SIZE = 65536  # of an image's side, a text's length and an embedding
RECORD, WEIGHTS = 'stage.json', 'weights.safetensors'
# Parameters of a network that training needs beside the stage's own.
AUXILIARY = 'auxiliary'
DTYPES: dict[str, Any] = {'bfloat16': ml_dtypes.bfloat16, 'float32': np.float32}


@dataclasses.dataclass(frozen=True)
class StageRecord:
  """The description of a stage on disk, without its weights.

  Attributes:
    path: its directory.
    config: the whole config that trained it; `config['stage']` defines it.
    text: `kind`, `dim`, `max_len` and `digest` of the text encoder; `store`, in
      which its embeddings were stored for training, if they were.
    weights: `dtype`, `bytes` and `sha256`; None for a training workdir.
    provenance: how it was made; {} for a training workdir.
  """

  path: pathlib.Path
  config: dict[str, Any]
  text: dict[str, Any]
  weights: dict[str, Any] | None = None
  provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    return self.config['stage']['name']

  @property
  def resolution(self) -> int:
    return self.config['stage']['resolution']

  @property
  def low_resolution(self) -> int | None:
    return self.config['stage']['low_resolution']

  @functools.cached_property
  def checkpoint(self) -> tuple[int, str]:
    """(step, digest) of a workdir's newest good checkpoint, cached."""
    with _checkpoints(self) as checkpoints:
      return checkpoints.newest_good()


def save_stage(
  path: AnyPath,
  params: Mapping[str, Any],
  *,
  config: Mapping[str, Any],
  text: Mapping[str, Any],
  provenance: Mapping[str, Any],
  dtype: str = 'bfloat16',
) -> None:
  """Writes one stage atomically.

  Args:
    path: its directory, which must not exist.
    params: nested dict of arrays.
    config: the whole config that trained it, as a plain dict.
    text: `dim`, `max_len` and `digest` of the text encoder.
    provenance: how it was made: command, commit, steps, time, jax.
    dtype: of the stored weights, 'bfloat16' or 'float32'.

  Raises:
    UsageError: the directory exists, or the dtype is unknown.
    ModelError: the directory cannot be written.
  """
  path = pathlib.Path(path)
  check_choice('dtype', dtype, DTYPES)
  if path.exists():
    raise UsageError(f'{path} exists and is not overwritten; choose another.')
  flat = traverse_util.flatten_dict(params)
  if any('/' in key for names in flat for key in names):
    raise ValueError(f'a parameter name of {path} contains a slash')
  kind = np.dtype(DTYPES[dtype])
  tensors = {
    '/'.join(names): Tensor(kind, np.shape(leaf), _cast(leaf, kind))
    for names, leaf in flat.items()
  }
  with files.replacing(path, error=ModelError) as temporary:
    temporary.mkdir()
    file = temporary / WEIGHTS
    safetensors.write_file(file, tensors)
    record = {
      'format_version': FORMAT_VERSION,
      'name': config['stage']['name'],
      'resolution': config['stage']['resolution'],
      'low_resolution': config['stage']['low_resolution'],
      'config': config,
      'text': text,
      'weights': {'dtype': dtype, **files.digest(file)},
      'provenance': provenance,
    }
    files.write_json(temporary / RECORD, record)


def load_config(workdir: AnyPath) -> dict[str, Any]:
  """The contents of a training workdir's config.json.

  Raises:
    ModelError: it is missing, damaged or of another format.
  """
  path = bucket.at(workdir) / 'config.json'
  record = files.read_json(path, version=FORMAT_VERSION)
  if not isinstance(record.get('config'), dict):
    raise ModelError(f'{path} holds no config; {files.COPY_AGAIN}.')
  return record


def checkpoint_folder(
  workdir: AnyPath, config: Mapping[str, Any]
) -> pathlib.Path:
  """Where a run of a config keeps its checkpoints."""
  folder = config['train']['checkpoint_dir'] or f'{workdir}/checkpoints'
  return bucket.at(folder, key='config.train.checkpoint_dir')


def load_stage(path: AnyPath) -> StageRecord:
  """The `StageRecord` of one directory, exported stage or training workdir.

  Raises:
    ModelError: it is neither, incomplete, or of another format.
  """
  path = bucket.at(path)
  exported = (path / RECORD).exists()
  file = path / (RECORD if exported else 'config.json')
  if not file.exists():
    raise ModelError(
      f'{path} is not a stage: it has neither {RECORD} nor config.json; give a '
      'model folder or a training workdir.'
    )
  record = files.read_json(file, version=FORMAT_VERSION)
  if exported and bucket.is_bucket(path):
    raise ModelError(
      f'{path} is an exported stage in a bucket, where only training workdirs '
      'are read; copy it to a local folder, such as with gcloud storage cp -r.'
    )
  if exported and not (path / WEIGHTS).exists():
    raise ModelError(f'{path} has no {WEIGHTS}; {files.COPY_AGAIN}.')
  try:
    stage = StageRecord(
      path=path,
      config=record['config'],
      text=record['text'],
      weights=record['weights'] if exported else None,
      provenance=record['provenance'] if exported else {},
    )
    config = stage.config
    sizes = [stage.text['dim'], stage.text['max_len'], stage.resolution]
    sizes += [stage.low_resolution] if stage.low_resolution is not None else []
    kinds: list[tuple[Any, Any]] = [
      (stage.name, str),
      (stage.provenance, dict),
      (config['text']['path'], str | None),
      (config['text']['dtype'], str),
      (config['train']['checkpoint_dir'], str | None),
      (config['data']['kind'], str),
      (stage.text['digest'], str),
      *((size, int) for size in sizes),
    ]
    if exported:
      kinds += [(record['weights']['sha256'], str)]
      kinds += [(record['weights']['bytes'], int)]
      DTYPES[record['weights']['dtype']]
    for value, kind in kinds:
      if not isinstance(value, kind):
        raise TypeError(f'{value!r} is no {kind}')
    if stage.text.get('store') not in (None, *STORES):
      raise TypeError(f'{stage.text["store"]!r} is not one of {STORES}')
    for size in sizes:
      if not 0 < size <= MAX_SIZE:
        raise TypeError(f'{size} is not in [1, {MAX_SIZE}]')
  except (KeyError, TypeError, AttributeError) as error:
    raise ModelError(
      f'{file} lacks a key or value that imagen_jax writes ({error}); '
      f'{files.COPY_AGAIN}.'
    ) from error
  return stage


def find_stages(
  path: AnyPath, names: Sequence[str] | None = None
) -> list[StageRecord]:
  """The stages of a model folder, from the base model up.

  Args:
    path: a folder of stages, or one stage.
    names: of the stages to use; all by default.

  Returns:
    list of `StageRecord`s, each upsampling the images of the one before it.

  Raises:
    ModelError: the folder is missing or incomplete, or a stage does not
      upsample the images of the one before it.
    UsageError: a name is unknown.
  """
  path = bucket.at(path)
  if not path.is_dir():
    raise ModelError(
      f'there is no model folder {path}; check the path, or leave it out for '
      'the demo model.'
    )
  if _is_stage(path):
    found = [load_stage(path)]
  else:
    found = [load_stage(p) for p in sorted(path.iterdir()) if _is_stage(p)]
  if not found:
    raise ModelError(
      f'{path} holds no stage: no directory in it has a {RECORD}, or the '
      'config.json of a training run; check the path, or train first.'
    )
  found.sort(key=lambda r: (r.low_resolution or 0, r.resolution))
  if names is not None:
    have = [record.name for record in found]
    for name in names:
      check_choice(f'a stage of {path}', name, have)
    found = [record for record in found if record.name in names]
    if [record.name for record in found] != list(names):
      # A list of settings has one for each of them, in this order.
      raise UsageError(
        f'stages are given as {",".join(names)}; give each once, from the base '
        f'model up: {",".join(record.name for record in found)}.',
        key='stages',
      )
  for lower, upper in zip(found, found[1:]):
    if upper.low_resolution != lower.resolution:
      raise ModelError(
        f'{path}: stage {upper.name} ({_span(upper)}) does not upsample the '
        f'images of {lower.name} ({_span(lower)}); choose other stages.'
      )
  return found


def without_auxiliary(params: dict[str, Any]) -> dict[str, Any]:
  """The parameters that sample, of those that are trained."""
  return {name: part for name, part in params.items() if name != AUXILIARY}


def load_params(
  record: StageRecord,
  *,
  put: Callable[[np.ndarray], Any] | None = None,
) -> dict[str, Any]:
  """A stage's parameters, checked against their digest.

  Args:
    record: from `find_stages` or `load_stage`.
    put: moves one float32 array to the devices; of an exported stage, the host
      then holds at most one array at a time. None: all stay on the host.

  Returns:
    nested dict of float32 numpy arrays, or of the results of `put`.

  Raises:
    ModelError: naming the file that is missing or damaged.
  """
  put = put or (lambda array: array)
  if record.weights is None:
    step, _ = record.checkpoint
    with _checkpoints(record) as checkpoints:
      tree, _, _ = checkpoints.restore_subtree('ema_params', step)
    return jax.tree.map(put, without_auxiliary(tree))
  file = record.path / WEIGHTS
  try:
    intact = files.digest(file)['sha256'] == record.weights['sha256']
  except OSError as error:
    raise ModelError(
      f'{file} cannot be read ({error}); {files.COPY_AGAIN}.'
    ) from error
  if not intact:
    raise ModelError(
      f'{file} is damaged: its sha256 is not the one in {RECORD}; '
      f'{files.COPY_AGAIN}.'
    )
  params = {
    name: put(tensor.read().astype(np.float32, copy=False))
    for name, tensor in safetensors.open_file(file).items()
  }
  return traverse_util.unflatten_dict(params, sep='/')


def param_shapes(record: StageRecord) -> dict[str, tuple[int, ...]] | None:
  """The shapes of an exported stage's parameters, nested; None for a workdir.

  Raises:
    ModelError: the file of weights is missing or damaged.
  """
  if record.weights is None:
    return None
  tensors = safetensors.open_file(record.path / WEIGHTS)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  return traverse_util.unflatten_dict(shapes, sep='/')


def float32_bytes(record: StageRecord) -> int:
  """Bytes of an exported stage's parameters in float32; 0 for a workdir.

  A workdir's size is unknown. To split its network over devices, export it, or
  give the number of devices.
  """
  if record.weights is None:
    return 0
  kind = np.dtype(DTYPES[record.weights['dtype']])
  return record.weights['bytes'] * 4 // kind.itemsize


def weights_digest(record: StageRecord) -> str:
  """The sha256 that identifies a stage's weights."""
  if record.weights is None:
    return record.checkpoint[1]
  return record.weights['sha256']


def model_digest(records: Sequence[StageRecord]) -> str:
  """16 hex digits that identify all weights, the text encoder's included."""
  digests = [weights_digest(r) + r.text['digest'] for r in records]
  return hashlib.sha256(' '.join(digests).encode()).hexdigest()[:16]


def _checkpoints(record: StageRecord) -> 'Checkpoints':
  # Orbax takes a third of a second to import; exported stages do not need it.
  from imagen_jax.io.checkpoint import Checkpoints

  return Checkpoints(checkpoint_folder(record.path, record.config))


def _is_stage(path: pathlib.Path) -> bool:
  """Whether a directory looks like a stage, even an incomplete one."""
  if path.name.startswith('.'):  # what a killed export left
    return False
  try:  # a workdir, perhaps before its first checkpoint
    return 'stage' in files.read_json(path / 'config.json')['config']
  except (ModelError, KeyError, TypeError):
    pass  # other folders have a config.json too
  return any((path / n).exists() for n in (RECORD, WEIGHTS, 'checkpoints'))


def _span(record: StageRecord) -> str:
  low = record.low_resolution
  return f'{"text" if low is None else low}→{record.resolution}'


def _cast(leaf: Any, kind: np.dtype) -> Callable[[], np.ndarray]:
  return lambda: np.asarray(leaf).astype(kind)
