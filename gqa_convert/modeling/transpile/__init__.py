"""Exact native transpiling: a checkpoint of one family read as one of another stock family that computes the same.

Some families have no setting for KV heads, but another family of transformers expresses their function exactly and has
one. A rule (one file in `rules/`, found by itself) says how; `view.transpiled` makes a lazy checkpoint of the other
family from it, which everything else treats as any other multi-head checkpoint.
"""
