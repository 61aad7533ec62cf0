"""The transpile rules: one file each, found by themselves; see `gqa_convert.modeling.transpile.rule`."""
