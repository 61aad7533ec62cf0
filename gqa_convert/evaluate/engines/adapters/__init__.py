"""Code that runs in an engine's own Python, which need not have this package: nothing here imports it."""
