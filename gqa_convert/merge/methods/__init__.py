"""One file a merge method; see `gqa_convert.merge.registry`."""
