import signal
import sys

if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: no traceback

from imagen_jax.cli.sample import main  # noqa: E402

sys.exit(main())
