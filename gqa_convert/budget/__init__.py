"""Formulas of uptraining budgets: tokens, FLOPs, hours; no torch."""
