import sys

from imagen_jax.cli.plan import main

sys.exit(main())
