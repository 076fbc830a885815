"""One file per run, as lab notes; `get_config()` returns a ConfigDict."""
