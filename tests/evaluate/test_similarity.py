from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gqa_convert.evaluate.similarity import head_similarity


def test_heads_in_another_basis_become_alike(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llama)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        heads = attention.v_proj.weight.view(4, 8, 32)
        turn, _ = torch.linalg.qr(torch.randn(8, 8))
        heads[1] = turn @ heads[0]
        heads[3] = heads[2]
    model.save_pretrained(tmp_path)
    first, second = head_similarity(tmp_path, 2)
    assert first.layer.startswith("model.layers.0")
    assert first.values_before < 0.8
    assert first.values_after == pytest.approx(1.0, abs=1e-4)
    for layer in (first, second):
        assert layer.keys_after >= layer.keys_before - 1e-6
        assert layer.values_after >= layer.values_before - 1e-6
