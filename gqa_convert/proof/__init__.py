"""Proof on tiny random models: what the converter claims, shown on every architecture rather than listed."""
