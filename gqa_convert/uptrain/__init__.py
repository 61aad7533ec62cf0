"""Uptraining: continue pretraining a converted checkpoint on a small share of its original budget."""
