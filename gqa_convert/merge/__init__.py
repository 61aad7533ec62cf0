"""Merges: pure functions that turn K KV heads into G shared ones. They know no files, models or configs.

Importing this package imports no torch, so that the command line can list the methods at once.
"""

from __future__ import annotations

from gqa_convert.merge.registry import MergeMethod, all_methods, get_method, merge_method
from gqa_convert.merge.seeding import generator_for

__all__ = ["MergeMethod", "all_methods", "generator_for", "get_method", "merge_method"]
