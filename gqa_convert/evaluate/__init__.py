"""What a conversion cost and what it saved: held-out loss, divergence, cache, decode time, and sweeps over groups."""
