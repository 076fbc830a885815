"""One file per run: `get_config()` returns what differs from `common`."""
