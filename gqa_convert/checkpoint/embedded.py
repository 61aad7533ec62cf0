"""Where the embedded default is."""

from __future__ import annotations

from pathlib import Path

DEMO = "demo"
"""What the embedded checkpoint is called wherever a model is named, unless a folder of that name is there."""

CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
"""The embedded default checkpoint: Llama architecture, 8 query heads with a KV head each."""
