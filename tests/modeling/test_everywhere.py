"""Every family of the shipped file beside its original with tied heads: generation by any cache, saving, training.

Slow: `pytest -m slow tests/modeling`. The usual run has a few of the families in `test_shipped.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert import convert
from gqa_convert.contract.kv_axes import KVAxes
from gqa_convert.modeling import modeling_gqa, shipping
from gqa_convert.tiny.forward import difference, logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.overrides import KV_HEADS, SIDE_FILES
from gqa_convert.tiny.shrink import tiny_config

pytestmark = pytest.mark.slow

NEW = 6
UNWRITTEN = {"pop2piano", "seamless_m4t", "seamless_m4t_v2"}  # their `generate` takes sounds only
CACHES: dict[str, dict[str, Any]] = {
    "cached": {},
    "without": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams_without": {"num_beams": 3, "use_cache": False},
}


def pair(model_type: str, root: Path) -> tuple[Any, ...]:
    """A native model with tied heads and its conversion: one function."""
    heads, groups = KV_HEADS.get(model_type, (8, 2))
    grouped = tiny_model(tiny_config(model_type, num_kv_heads=groups), 0)
    native = tiny_model(tiny_config(model_type, num_kv_heads=heads), 1)
    native.load_state_dict(KVAxes(native, grouped, heads, groups).expand(grouped.state_dict()))
    native.config.decoder_start_token_id = native.generation_config.decoder_start_token_id = 0
    native.save_pretrained(root / "source")
    for file, content in SIDE_FILES.get(model_type, {}).items():
        torch.save(content, root / "source" / file)
    convert(root / "source", groups=groups, out=root / "converted", route="remote-code", allow_slow=True)
    return tuple(
        type(model).from_pretrained(root / name).eval() for model, name in ((native, "source"), (grouped, "converted"))
    )


def encoded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs as a model takes them, what an encoder would give included."""
    if "encoder_hidden" in inputs:
        from transformers.modeling_outputs import BaseModelOutput

        states = BaseModelOutput(last_hidden_state=inputs["encoder_hidden"])
        states.attention_mask = states.router_logits = None
        inputs = {"encoder_outputs": states} | {name: x for name, x in inputs.items() if name != "encoder_hidden"}
    return inputs


def written(model: Any, **choices: Any) -> Any:
    """What a model writes."""
    tokens = model.eval().generate(
        **encoded(text_inputs(model, length=5)),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        **choices,
    )
    return tokens.tolist()


def narrow_gradients(model: Any, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Gradients of the decoder's key and value projections."""
    (model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable)()
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    inputs = encoded(text_inputs(model))
    model.train()(**inputs, use_cache=False).logits.float().square().mean().backward()
    modules = modeling_gqa.decoder_attention(model)
    named = {f"{path}.{name}": p.grad for path, each in modules.items() for name, p in each.named_parameters()}
    return {name: grad for name, grad in named.items() if grad is not None}


@pytest.fixture(params=sorted(shipping.FAMILIES))
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Any]:
    torch.set_num_threads(1)
    return request.param, *pair(request.param, tmp_path)


def test_it_does_what_the_original_does(models: tuple[str, Any, Any], tmp_path: Path) -> None:
    model_type, native, grouped = models
    if model_type not in UNWRITTEN:
        texts = {name: written(grouped, **choices) for name, choices in CACHES.items()}
        assert texts == {name: written(native, **choices) for name, choices in CACHES.items()}
        assert texts["cached"] == texts["without"] == texts["static"]
        assert texts["beams"] == texts["beams_without"]
    inputs = text_inputs(grouped)
    grouped.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_gqa.py").is_file()
    again = type(grouped).from_pretrained(tmp_path / "again").eval()
    assert difference(logits(grouped, inputs), logits(again, inputs)) == 0
    if not native.supports_gradient_checkpointing:
        return
    plain, checkpointed = (narrow_gradients(grouped, checkpointing=choice) for choice in (False, True))
    assert plain.keys() == checkpointed.keys() != set()
    assert max(float(grad.abs().max()) for grad in plain.values()) > 0
    assert all(difference(plain[name], checkpointed[name]) < 1e-5 for name in plain)
