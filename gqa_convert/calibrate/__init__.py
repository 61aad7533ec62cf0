"""Fitting a conversion to data: calibration text, activations layer by layer, and the local refit of each layer."""
