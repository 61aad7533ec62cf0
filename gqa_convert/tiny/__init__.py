"""Tiny random models of an architecture: what anatomy, conversion and the contract try things on."""
