"""Where the embedded default is."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
"""The embedded default checkpoint: Llama architecture, 8 query heads with a KV head each."""
