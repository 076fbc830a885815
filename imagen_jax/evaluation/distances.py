"""Distances between two sets of images in a network's feature space.

Fréchet distance (Heusel et al. 2017; FID with Inception's features), KID
(Bińkowski et al. 2018), CMMD (Jayasumana et al. 2024; CLIP's features),
precision and recall (Kynkäänniemi et al. 2019). Pure functions of features,
in float64: covariances of 2048 correlated features need it.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

# Any float type; computed in float64.
Vector = Float[np.ndarray, ' d']
Matrix = Float[np.ndarray, 'd d']
FeaturesA = Float[np.ndarray, 'n d']
FeaturesB = Float[np.ndarray, 'm d']
Kernel = Float[np.ndarray, 'n m']


def moments(features: FeaturesA) -> tuple[Vector, Matrix]:
  """Mean and unbiased covariance of n ≥ 2 feature vectors, as float64.

  Raises:
    ValueError: n < 2.
  """
  features = np.asarray(features, np.float64)
  if len(features) < 2:
    raise ValueError(f'{len(features)} images have no covariance')
  return features.mean(0), np.cov(features, rowvar=False).reshape(
    2 * features.shape[1:]
  )


def _roots(values: Vector) -> Vector:
  """Square roots of eigenvalues, where rounding errors count as 0.

  An eigenvalue of 0 is computed as about ±1e-16 of the largest. Its root would
  be 1e-8 of the largest root and never negative: many of them add a bias.
  """
  noise = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
  return np.sqrt(np.where(values > noise, values, 0))


def _root(cov: Matrix) -> Matrix:
  """The symmetric square root of a covariance."""
  values, vectors = np.linalg.eigh(cov)
  return (vectors * _roots(values)) @ vectors.T


def frechet(
  mean_a: Vector, cov_a: Matrix, mean_b: Vector, cov_b: Matrix
) -> float:
  """The Fréchet distance of two Gaussians, squared (Heusel et al. 2017).

  |m_a − m_b|² + tr(C_a + C_b − 2 (C_a C_b)^½). The trace of the root is that
  of (R C_b R)^½ with R = C_a^½, which is symmetric. So no complex numbers
  arise, even if the covariances are singular, and no regularisation is added.

  Args:
    mean_a, mean_b: means.
    cov_a, cov_b: covariances, symmetric, with no negative eigenvalue.
  """
  root = _root(np.asarray(cov_a, np.float64))
  middle = root @ np.asarray(cov_b, np.float64) @ root
  values = np.linalg.eigvalsh((middle + middle.T) / 2)
  cross = _roots(values).sum()
  step = np.asarray(mean_a, np.float64) - mean_b
  return float(step @ step + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kid(
  a: FeaturesA,
  b: FeaturesB,
  *,
  subsets: int = 100,
  size: int = 1000,
  seed: int = 0,
) -> tuple[float, float]:
  """Kernel inception distance (Bińkowski et al. 2018).

  The unbiased squared MMD of the kernel (x·y/D + 1)³.

  Args:
    a, b: features of the two sets.
    subsets: number of random subsets of both sets to average over.
    size: of the subsets; at most that of the smaller set.
    seed: of the subsets.

  Returns:
    (mean, standard deviation over the subsets).
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  size = min(size, len(a), len(b))
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(subsets):
    x = a[rng.choice(len(a), size, replace=False)]
    y = b[rng.choice(len(b), size, replace=False)]
    xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
    inside = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    found.append(inside / (size * (size - 1)) - 2 * xy.mean())
  return float(np.mean(found)), float(np.std(found))


def _cubic(x: FeaturesA, y: FeaturesB) -> Kernel:
  return (x @ y.T / x.shape[1] + 1) ** 3


def cmmd(
  a: FeaturesA, b: FeaturesB, *, sigma: float = 10.0, block: int = 1024
) -> float:
  """CLIP maximum mean discrepancy, times 1000 (Jayasumana et al. 2024).

  The squared MMD of the kernel exp(−|x − y|² / 2σ²) over all pairs.

  Args:
    a, b: features of the two sets; each row is normalised here.
    sigma: of the kernel; 10 in the paper.
    block: rows at a time.
  """
  a, b = _unit(a), _unit(b)

  def mean(x: FeaturesA, y: FeaturesB) -> float:
    total = 0.0
    for start in range(0, len(x), block):
      squared = np.maximum(2 - 2 * x[start : start + block] @ y.T, 0)
      # expm1, since all kernel values are near 1 and only differences matter.
      total += np.expm1(-squared / (2 * sigma**2)).sum()
    return total / (len(x) * len(y))

  return float(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))


def _unit(features: FeaturesA) -> FeaturesA:
  features = np.asarray(features, np.float64)
  return features / np.linalg.norm(features, axis=1, keepdims=True)


def precision_recall(
  real: FeaturesA,
  generated: FeaturesB,
  *,
  k: int = 3,
  size: int = 10_000,
  seed: int = 0,
  block: int = 1024,
) -> tuple[float, float]:
  """(precision, recall) of generated images (Kynkäänniemi et al. 2019).

  A set's manifold is the union of balls around its members, each with the
  distance to the member's k-th neighbour as radius. Precision is the fraction
  of generated images on the manifold of the real ones, recall the reverse. Both
  depend on the number of images, so the same number of random ones is taken of
  either set.

  Args:
    real, generated: features of more than k images each.
    k: the neighbour whose distance is the radius.
    size: images of each set; at most those of the smaller set.
    seed: of the choice.
    block: rows at a time.

  Raises:
    ValueError: there are too few images.
  """
  size = min(size, len(real), len(generated))
  if size <= k:
    raise ValueError(f'precision and recall need more than {k} images')
  rng = np.random.default_rng(seed)
  real, generated = (
    np.asarray(x[rng.choice(len(x), size, replace=False)], np.float64)
    for x in (real, generated)
  )
  precision = _on_manifold(generated, real, k, block)
  return precision, _on_manifold(real, generated, k, block)


def _squared(x: FeaturesA, y: FeaturesB, block: int) -> Iterator[Kernel]:
  """Squared distances, `block` rows of x at a time."""
  yy = (y * y).sum(1)
  for i in range(0, len(x), block):
    rows = x[i : i + block]
    xx = (rows * rows).sum(1, keepdims=True)
    yield np.maximum(xx + yy - 2 * rows @ y.T, 0)


def _on_manifold(
  points: FeaturesA, centres: FeaturesB, k: int, block: int
) -> float:
  # The nearest is the centre itself, so the k-th neighbour has index k.
  radius = np.concatenate(
    [
      np.partition(x, k, axis=1)[:, k]
      for x in _squared(centres, centres, block)
    ]
  )
  inside = [(x <= radius).any(1) for x in _squared(points, centres, block)]
  return float(np.concatenate(inside).mean())


def clip_scores(images: FeaturesA, texts: FeaturesA) -> Float[np.ndarray, ' n']:
  """CLIP score of each pair: 100 · max(cosine, 0).

  Hessel et al. (2021) define 2.5 · max(cosine, 0), of captions that begin with
  "A photo depicts"; this is what most papers on generation report.
  """
  images = images / np.linalg.norm(images, axis=1, keepdims=True)
  texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
  return 100 * np.maximum((images * texts).sum(1), 0)
