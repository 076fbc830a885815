import sys

from imagen_jax.cli.sample import main

sys.exit(main())
