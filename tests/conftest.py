"""Eight virtual CPU devices and one shared compilation cache for all tests."""

import os
import pathlib
import signal

# A shell has what it starts with & ignore Ctrl-C, and so would the processes
# that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path.home() / '.cache' / 'imagen_jax' / 'test-compile'),
)

import jax  # noqa: E402
import jaxlib  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
# So low that what one test has compiled, the next does not.
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
# Tiny programs take longer to compile than to run, a third of it for LLVM's
# optimizations. Subprocesses that tests start have them on.
jax.config.update('jax_disable_most_optimizations', True)
# Of the rest XLA's newer way to write fused operations takes a third. jaxlib
# 0.12 has no other, and crashes at the flag.
if (
  jaxlib.version.__version_info__ < (0, 11)
  and os.environ['JAX_PLATFORMS'] == 'cpu'
  and 'XLA_FLAGS' not in os.environ
):
  os.environ['XLA_FLAGS'] = '--xla_cpu_use_fusion_emitters=false'
  jax.devices()  # reads it
  del os.environ['XLA_FLAGS']

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

from tests import typecheck  # noqa: E402

# Calls into these modules are checked for types and shapes.
TYPED = [
  'imagen_jax.diffusion',
  'imagen_jax.nets',
  'imagen_jax.cascade',
  'imagen_jax.evaluation',
  'imagen_jax.deepfloyd.blocks',
  'imagen_jax.deepfloyd.lora',
  'imagen_jax.deepfloyd.loss',
  'imagen_jax.deepfloyd.sampling',
  'imagen_jax.deepfloyd.schedule',
  'imagen_jax.deepfloyd.stage',
  'imagen_jax.deepfloyd.text',
  'imagen_jax.deepfloyd.unet',
  'imagen_jax.training.state',
  'imagen_jax.training.optimizer',
  'imagen_jax.training.step',
]
if os.environ.get('IMAGEN_CHECK_TYPES', '1') == '1':
  install_import_hook(TYPED, f'{typecheck.__name__}.check')


def pytest_configure(config):
  """Makes PyPI's torchvision importable beside a torch for the CPU.

  It is built for CUDA. Its operators then do not load, and its import lacks two
  declarations. transformers and diffusers import it where it is installed.
  """
  if config.getoption('markexpr') != 'parity':
    return
  try:
    import torchvision  # noqa: F401
  except ImportError:
    return
  except RuntimeError:
    import torch

    config.torchvision = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
      config.torchvision.define(
        f'{name}(Tensor a, Tensor b, float c) -> Tensor'
      )


@pytest.fixture(scope='session')
def model(tmp_path_factory):
  """A tiny model folder; tests that change it copy it first."""
  from tests import tiny_model

  return tiny_model.write(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='session')
def bucket():
  """A bucket on this machine; tests use folders of their own in it."""
  from tests import fake_bucket

  with fake_bucket.served() as bucket:
    yield bucket


@pytest.fixture
def programs_folder(tmp_path, monkeypatch):
  """Where compiled programs are kept, empty."""
  from imagen_jax.cascade import programs

  path = tmp_path / 'programs'
  path.mkdir(mode=0o700)
  monkeypatch.setattr(programs, 'find_folder', lambda: path)
  return path
