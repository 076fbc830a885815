import signal
import sys

if __name__ == '__main__':  # not where `data.workers` begin
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: no traceback

  from imagen_jax.cli.train import main

  sys.exit(main())
