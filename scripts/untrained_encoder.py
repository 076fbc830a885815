"""Writes a BERT with random weights, to compare with the pretrained one.

  python scripts/untrained_encoder.py all-minilm-l6-v2 random --seed 0
  python scripts/untrained_encoder.py all-minilm-l6-v2 table --table --seed 0

The folder has the same tokenizer and sizes. With --table its layers pass on
what they get, so that the encoder is a table: a random vector for each piece of
the tokenizer, without its context. What these mean is learned by the
projections of the network that is conditioned on them.
"""

import argparse
import pathlib
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from imagen_jax.io import text_folder

PASSED_ON = ('.layer.', 'position_', 'token_type_')


def main() -> None:
  """Entry point."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    'source', type=text_folder.find, help='of the real weights, a text.path'
  )
  parser.add_argument('target', type=pathlib.Path, help='folder to write')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args()
  rng = np.random.default_rng(args.seed)
  shutil.copytree(args.source, args.target)
  tensors = load_file(args.source / 'model.safetensors')
  for name, tensor in sorted(tensors.items()):
    if tensor.dtype.kind == 'f':
      tensors[name] = _weights(rng, name, tensor.shape, args.table)
  save_file(tensors, args.target / 'model.safetensors')
  print(f'{args.target}: {len(tensors)} tensors')


def _weights(
  rng: np.random.Generator, name: str, shape: tuple[int, ...], table: bool
) -> np.ndarray:
  """A parameter as BERT initialises it; of a table, zeros inside the layers."""
  if 'LayerNorm' in name and name.endswith(('weight', 'gamma')):
    return np.ones(shape, np.float32)
  inside = any(part in name for part in PASSED_ON)
  if len(shape) == 1 or (table and inside):
    return np.zeros(shape, np.float32)
  return (0.02 * rng.standard_normal(shape)).astype(np.float32)


if __name__ == '__main__':
  main()
