"""The decode benchmark: time per token, cache and peak memory of a model beside its conversions."""
