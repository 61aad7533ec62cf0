"""Convert multi-head-attention checkpoints to grouped-query attention."""
