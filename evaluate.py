import sys

from imagen_jax.cli.evaluate import main

sys.exit(main())
