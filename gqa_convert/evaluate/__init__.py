"""What a conversion cost and what it saved: held-out loss, divergence, cache, decode time, and sweeps over groups."""

from gqa_convert.rooms import call_through

call_through(__name__)
