"""Packaging of imagen_jax; tool settings live in pyproject.toml."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
TEST = ['beartype', 'fonttools', 'pytest>=8', 'pytest-xdist>=3.2']
DEEPFLOYD = ['beautifulsoup4', 'ftfy']
PARITY = ['torch', 'diffusers', 'scipy', *DEEPFLOYD]

setuptools.setup(
  name='imagen_jax',
  version='0.1.0',
  description='Imagen (Saharia et al. 2022) in JAX and Flax: text in, '
  'images out, through a cascade of diffusion models.',
  long_description=(HERE / 'README.md').read_text(encoding='utf-8')
  if (HERE / 'README.md').exists()
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
  package_data={'imagen_jax': ['assets/**/*', 'worlds/*.json', 'py.typed']},
  install_requires=[
    'absl-py',
    'array_record>=0.8',
    'etils[epath]',
    'flax>=0.12',
    'grain>=0.2.15',
    'importlib_resources',  # tensorflow-datasets needs it and omits it
    'jax>=0.10',
    'jaxtyping>=0.3',
    'ml-collections>=1.1',
    'ml_dtypes',
    'numpy>=2',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12,<1',  # 1.0 changes the top-level API
    'pillow>=11',
    'safetensors>=0.8',  # reads a tensor at a time, not mapped
    'sentencepiece>=0.2',
    'tensorflow-datasets>=4.9.10',
    'transformers>=5',
  ],
  extras_require={
    'test': TEST,
    'parity': TEST + PARITY,
    'tpu': ['jax[tpu]'],
    'deepfloyd': DEEPFLOYD,  # text cleaning
    'cuda12': ['jax[cuda12]'],
    'cuda13': ['jax[cuda13]'],
    'plan': ['jax[tpu]'],  # libtpu, which compiles without a TPU as well
    'notebook': ['ipykernel', 'nbclient'],
    'tensorboard': ['tensorboardX'],
    'wandb': ['wandb'],
  },
  entry_points={
    'console_scripts': [
      'imagen-train = imagen_jax.cli.train:main',
      'imagen-sample = imagen_jax.cli.sample:main',
      'imagen-export = imagen_jax.cli.export:main',
      'imagen-plan = imagen_jax.cli.plan:main',
      'imagen-prepare = imagen_jax.cli.prepare:main',
      'imagen-check-t5-xxl = imagen_jax.deepfloyd.check_t5_xxl:main',
      'imagen-evaluate = imagen_jax.cli.evaluate:main',
    ]
  },
)
