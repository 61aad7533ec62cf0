"""Families without a KV-head setting, from conversion to the final folder, under the keys that the hub has."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gqa_convert import convert
from gqa_convert.contract.remote_code import leave_inputs, meet_strangers
from gqa_convert.conversion.inspect import verify_pair
from gqa_convert.errors import UsageError
from gqa_convert.tiny.forward import logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import tiny_config
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.model import can_skip_head
from gqa_convert.uptrain.read_config import parse_config
from tests.support import load_with_info


@pytest.fixture
def converted(tiny_folder: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def make(
        model_type: str, groups: int = 2, rename: Callable[..., Any] | None = None, **changes: Any
    ) -> tuple[Path, Path]:
        source = tmp_path / model_type
        model = tiny_model(tiny_config(model_type, changes=changes))
        model.config.decoder_start_token_id = 0
        model.save_pretrained(source)
        if rename is not None:
            file = source / "model.safetensors"
            save_file(rename(load_file(file)), file, {"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tiny_folder / name, source / name)
        return source, convert(source, groups=groups, out=tmp_path / "converted", allow_slow=True).out

    return make


def trained(settings: dict[str, Any], folder: Path, **changes: Any) -> Path:
    values = {**settings, "model": str(folder), "budget": {"steps": 12}}
    values["train"] = values["train"] | changes
    result = loop.uptrain(parse_config(values), quiet=True)
    assert result.loss_after < result.loss_before - 0.2
    return result.folder


def as_on_the_hub(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefix of today's names, and with masks that no code reads any more."""
    state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    biases = [key for key in state if key.endswith("attn.c_attn.weight")]
    return state | {key.replace("c_attn.weight", "bias"): torch.ones(1, 1, 8, 8) for key in biases}


def test_a_gpt2_keeps_its_code_and_the_keys_of_the_hub(
    settings: dict[str, Any], converted: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, folder = converted("gpt2", rename=as_on_the_hub)
    final = trained(settings, folder)
    before, after = (load_file(each / "model.safetensors").keys() for each in (folder, final))
    assert before == after
    assert "h.1.attn.bias" in after
    checks = verify_pair(source, final)
    assert (checks["identical"], checks["merged"]) == (2, 0)  # the masks; training moved all else
    model = AutoModelForCausalLM.from_pretrained(final).eval()
    assert (final / "modeling_gqa.py").read_bytes() == (folder / "modeling_gqa.py").read_bytes()
    inputs = text_inputs(model, vocabulary=20)
    leave_inputs(final, inputs, logits(model, inputs))
    assert meet_strangers([final], tmp_path / "modules") == [""]


@pytest.mark.parametrize("parallel", [True, False])
def test_a_pythia_is_a_stock_model_to_the_end(
    settings: dict[str, Any], converted: Callable[..., tuple[Path, Path]], parallel: bool
) -> None:
    _, folder = converted("gpt_neox", use_parallel_residual=parallel)
    model, info = load_with_info(trained(settings, folder))
    assert type(model).__name__ == ("PhiForCausalLM" if parallel else "NemotronForCausalLM")
    assert type(model).__module__.startswith("transformers.")
    assert not any(info.values())


def test_a_bias_on_logits_is_no_obstacle() -> None:
    assert not can_skip_head(tiny_model(tiny_config("bart")))  # its hidden states are not as wide as the bias
    assert can_skip_head(tiny_model(tiny_config("t5")))


@pytest.mark.parametrize("parameters", ["attention", "lora"])
def test_parts_of_a_gpt2_can_be_trained(
    settings: dict[str, Any], converted: Callable[..., tuple[Path, Path]], parameters: str
) -> None:
    if parameters == "lora":
        pytest.importorskip("peft")
    _, folder = converted("gpt2")
    final = trained(settings, folder, parameters=parameters)
    before, after = (load_file(each / "model.safetensors") for each in (folder, final))
    moved = {key.rsplit(".", 2)[1] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"c_attn", "c_proj"}
    assert not any(".mlp." in key for key in before if not torch.equal(before[key], after[key]))


def test_adapters_do_not_fit_projections_that_repeat_heads(
    settings: dict[str, Any], converted: Callable[..., tuple[Path, Path]]
) -> None:
    pytest.importorskip("peft")
    _, folder = converted("opt")
    settings["data"]["separate_documents"] = False
    with pytest.raises(UsageError, match="is a SpreadLinear, whose output is wider"):
        trained(settings, folder, parameters="lora")


def test_a_model_that_listens_is_not_trained_on_text(
    settings: dict[str, Any], converted: Callable[..., tuple[Path, Path]]
) -> None:
    _, folder = converted("whisper")
    settings["objective"] = {"kind": "span_corruption"}
    with pytest.raises(UsageError, match="reads input_features"):
        trained(settings, folder)
