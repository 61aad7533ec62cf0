"""Uptraining: continue pretraining a converted checkpoint on a small share of its original budget."""

from gqa_convert.rooms import call_through

call_through(__name__)
