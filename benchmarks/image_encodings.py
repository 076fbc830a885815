r"""Bytes and quality of the encodings of `imagen-prepare`.

  python benchmarks/image_encodings.py --size 256 photos/*.jpg

Each photograph is cropped and resized as in training, then encoded. PSNR is
that of the decoded pixels, in dB.
"""

import argparse
import math
import statistics
import time

import numpy as np

from imagen_jax.data.encoding import KINDS, QUALITY, Encoding
from imagen_jax.io.decode import decode


def psnr(x, y):
  """Peak signal-to-noise ratio of uint8 images, in dB."""
  error = np.mean((x.astype(float) - y) ** 2)
  return 10 * math.log10(255**2 / error) if error else math.inf


def measure(encoding, images):
  """(mean bytes, mean PSNR, ms to encode, ms to decode) of an image."""
  start = time.process_time()
  encoded = [encoding.encode(image) for image in images]
  middle = time.process_time()
  decoded = [encoding.decode(data, *images[0].shape[:2]) for data in encoded]
  stop = time.process_time()
  return (
    statistics.mean(map(len, encoded)),
    statistics.mean(map(psnr, images, decoded)),
    (middle - start) / len(images) * 1e3,
    (stop - middle) / len(images) * 1e3,
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', type=int, default=256)
  parser.add_argument('photographs', nargs='+')
  args = parser.parse_args()
  images = [decode(path, args.size) for path in args.photographs]
  print(f'{len(images)} images of {args.size} pixels')
  for kind in KINDS:
    row = measure(Encoding(kind, QUALITY.get(kind)), images)
    print('{:5} {:8.0f} B {:5.1f} dB {:6.2f} ms {:6.2f} ms'.format(kind, *row))


if __name__ == '__main__':
  main()
