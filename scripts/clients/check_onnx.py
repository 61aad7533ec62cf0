"""Client check: ONNX Runtime on a graph that torch exports."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import main
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    """Token ids to logits, with no cache in the graph."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, T) to (1, T, V)."""
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def logits_of(folder: Path, ids: list[int]) -> Any:
    """Logits of every position."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    tokens = torch.tensor([ids])
    with tempfile.TemporaryDirectory() as out:
        file = f"{out}/model.onnx"
        torch.onnx.export(Logits(model), (tokens,), file, input_names=["ids"], dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"ids": tokens.numpy()})[0][0]


if __name__ == "__main__":
    main(logits_of, lambda: f"ONNX Runtime {onnxruntime.__version__}")
