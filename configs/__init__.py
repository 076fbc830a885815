"""One file per run, with its notes; `get_config()` returns a ConfigDict."""
