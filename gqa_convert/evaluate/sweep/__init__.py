"""Sweeps: one model at several group counts, and the point to choose."""
