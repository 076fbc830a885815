import sys

from imagen_jax.cli.train import main

sys.exit(main())
