"""A checkpoint's own modelling code: proven on a tiny model of it, or refused; what is not run is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gqa_convert import convert, plan
from gqa_convert.conversion.inspect import verify_pair
from gqa_convert.errors import CheckpointError, HubError, UnsupportedModelError
from gqa_convert.hf.loading import Source
from tests import factories
from tests.factories import SIZES
from tests.support import Command, script_module

GROUPS = 2
IDS = torch.arange(3, 27)[None]

HEAD = """
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as L
class OwnConfig(LlamaConfig):
    model_type = "{name}"
class Attention(L.LlamaAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        K, D, X = config.num_key_value_heads, self.head_dim, config.hidden_size
        H, n = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
"""
TAIL = """
class OwnForCausalLM(L.LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers): layer.self_attn = Attention(config, i)
        self.post_init()
"""
SEPARATE = """
        del self.k_proj, self.v_proj
        self.wk, self.wv = nn.Linear(X, K * D), nn.Linear(X, K * D)
    def k_proj(self, x): return self.wk(x)
    def v_proj(self, x): return self.wv(x)
"""
PAIRS = """
        del self.k_proj, self.v_proj
        self.key_value = nn.Linear(X, 2 * K * D, bias=False)
    def _of(self, x, which): return self.key_value(x).unflatten(-1, (-1, 2, self.head_dim))[..., which, :].flatten(-2)
    def k_proj(self, x): return self._of(x, 0)
    def v_proj(self, x): return self._of(x, 1)
"""
HALVES = """
        del self.k_proj, self.v_proj
        self.kv, self.dim = nn.Linear(X, 2 * K * D, bias=False), D
        del self.head_dim
    def k_proj(self, x): return self.kv(x).chunk(2, -1)[0]
    def v_proj(self, x): return self.kv(x).chunk(2, -1)[1]
    def forward(self, *a, **k):
        self.head_dim = self.dim
        try: return super().forward(*a, **k)
        finally: del self.head_dim
"""
PACK = """
        del self.q_proj, self.k_proj, self.v_proj
        self.W_pack, self.cut = nn.Linear(X, (H + 2 * K) * D, bias=False), [H * D, K * D, K * D]
    def q_proj(self, x): return self.W_pack(x).split(self.cut, -1)[0]
    def k_proj(self, x): return self.W_pack(x).split(self.cut, -1)[1]
    def v_proj(self, x): return self.W_pack(x).split(self.cut, -1)[2]
"""
# Query head i reads KV head i % K, not i // (H / K); with all heads that is the same.
STRIDED = """
        class Turned(nn.Linear):
            def forward(self, x): return super().forward(x).unflatten(-1, (n, K, D)).transpose(-3, -2).flatten(-3)
        class Back(nn.Linear):
            def forward(self, x): return super().forward(x.unflatten(-1, (K, n, D)).transpose(-3, -2).flatten(-3))
        self.q_proj, self.o_proj = Turned(X, H * D, bias=False), Back(H * D, X, bias=False)
"""
# The shapes of heads one after the other, in which the channels of all heads alternate.
ALTERNATING = """
    def _turned(self, y): return y.unflatten(-1, (self.head_dim, -1)).transpose(-1, -2).flatten(-2)
    def forward(self, *a, **k):
        self.k_proj.register_forward_hook(lambda m, i, y: self._turned(y)) if not self.k_proj._forward_hooks else None
        self.v_proj.register_forward_hook(lambda m, i, y: self._turned(y)) if not self.v_proj._forward_hooks else None
        return super().forward(*a, **k)
"""
LARGE_ONLY = """
        if H < 8: raise RuntimeError("too small for this code")
"""
DEAF = """
    def forward(self, *a, **k):
        out, *rest = super().forward(*a, **k)
        return (0 * out, *rest)
"""


def write(folder: Path, body: str, *, name: str, **sizes: Any) -> Any:
    """Write a checkpoint with its own code, its KV heads random, and return the model."""
    folder.mkdir(parents=True)
    file = folder / f"modeling_{name}.py"
    file.write_text(HEAD.format(name=name) + body + TAIL)
    code = script_module(file)
    torch.manual_seed(0)
    model = code.OwnForCausalLM(code.OwnConfig(**{**SIZES, **sizes})).eval()
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    save(model, folder, name)
    return model


def save(model: Any, folder: Path, name: str) -> None:
    model.save_pretrained(folder)
    refers = {"AutoConfig": f"modeling_{name}.OwnConfig", "AutoModelForCausalLM": f"modeling_{name}.OwnForCausalLM"}
    factories.change_config(folder, auto_map=refers)


def tie(parameter: torch.Tensor) -> None:
    """Make the heads of each group equal."""
    heads = parameter.data.view(GROUPS, factories.HEADS // GROUPS, -1)
    heads.copy_(heads[:, :1].expand_as(heads).clone())


def run(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def test_own_code_whose_heads_are_shown_converts_exactly(tmp_path: Path) -> None:
    model = write(tmp_path / "separate", SEPARATE, name="separate")
    for name, parameter in model.named_parameters():
        if ".wk." in name or ".wv." in name:
            tie(parameter)
    save(model, tmp_path / "separate", "separate")
    done = convert(tmp_path / "separate", groups=GROUPS, out=tmp_path / "out", verify="logits", trust_remote_code=True)
    torch.testing.assert_close(run(tmp_path / "out"), run(tmp_path / "separate"), atol=1e-5, rtol=0)
    assert any("own code run: modeling_separate.OwnForCausalLM" in note for note in done.plan.notes)
    assert verify_pair(tmp_path / "separate", tmp_path / "out", trust_remote_code=True)["differing"] == []


def test_blocks_of_own_code_are_solved_as_that_code(tmp_path: Path) -> None:
    """Also the tiny models that freedom is tried on are of the checkpoint's own class."""
    write(tmp_path / "vendored", "", name="vendored")
    out = convert(tmp_path / "vendored", groups=4, out=tmp_path / "out", method="pca", trust_remote_code=True).out
    assert run(tmp_path / "out").isfinite().all()
    assert Source.open(out, trust_remote_code=True).own_code == "modeling_vendored.OwnForCausalLM"


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        ("pairs", PAIRS, "not 8 KV heads of width 8"),
        ("halves", HALVES, "not 8 KV heads of width 8"),
        ("pack", PACK, "a fused projection whose layout is not known"),
        ("strided", STRIDED, "merging equal heads of a tiny model of it moves its logits"),
        ("alternating", ALTERNATING, "merging equal heads of a tiny model of it moves its logits"),
        ("large_only", LARGE_ONLY, r"cannot be tried on a tiny model \(RuntimeError: too small"),
        ("deaf", DEAF, "do not tell its KV heads apart"),
    ],
)
def test_own_code_that_is_not_shown_to_convert_is_refused(name: str, body: str, why: str, tmp_path: Path) -> None:
    write(tmp_path / name, body, name=name)
    with pytest.raises(UnsupportedModelError, match=why):
        convert(tmp_path / name, groups=GROUPS, out=tmp_path / "out", trust_remote_code=True)
    assert not (tmp_path / "out").exists()


def test_own_code_with_groups_already_is_tried_with_groups(tmp_path: Path) -> None:
    write(tmp_path / "grouped", SEPARATE, name="grouped", num_key_value_heads=4)
    assert plan(tmp_path / "grouped", groups=2, trust_remote_code=True).groups == 2
    assert plan(tmp_path / "grouped", groups=1, trust_remote_code=True).groups == 1


def name_code(folder: Path, reference: str, **more: Any) -> Path:
    factories.change_config(folder, auto_map={"AutoModelForCausalLM": reference}, **more)
    return folder


def test_code_that_is_not_run_is_named(tmp_path: Path, command: Command) -> None:
    source = name_code(factories.make(tmp_path / "m"), "modeling_x.XForCausalLM")
    assert any(
        "own code not run" in note and "modeling_x.XForCausalLM" in note for note in plan(source, groups=4).notes
    )
    finished = command("gqa-convert", source, "--groups", 4, "--dry-run")
    assert finished.code == 0
    assert "modeling_x.XForCausalLM" in finished.out + finished.err


def test_code_of_a_tokenizer_or_of_another_head_is_no_modelling_code(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "m")
    entries = {"AutoTokenizer": ["tok.A", None], "AutoModelForSequenceClassification": "modeling_x.XForClasses"}
    factories.change_config(source, auto_map=entries)
    assert plan(source, groups=4, trust_remote_code=True).class_name == "LlamaForCausalLM"
    assert not any("own code" in note for note in plan(source, groups=4).notes)
    factories.change_config(source, auto_map="nonsense")
    with pytest.raises(CheckpointError, match="auto_map"):
        plan(source, groups=4)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("family", ["codegen", "gpt_neox", "opt", "bart"])
def test_a_native_type_with_own_code_is_not_rewritten_as_the_stock_one(
    family: str, trust: bool, tmp_path: Path
) -> None:
    """It is written as another family, or with the package's modelling code: neither knows what own code computes."""
    from gqa_convert.tiny.model import tiny_model
    from gqa_convert.tiny.shrink import tiny_config

    folder = tmp_path / f"own_{family}"
    model = tiny_model(tiny_config(family))
    model.save_pretrained(folder)
    name = type(model).__name__
    (folder / "modeling_own.py").write_text(f"from transformers import {name} as Base\nclass {name}(Base):\n    pass\n")
    auto = "AutoModelForSeq2SeqLM" if family == "bart" else "AutoModelForCausalLM"
    factories.change_config(folder, auto_map={auto: f"modeling_own.{name}"})
    with pytest.raises(UnsupportedModelError, match=r"auto_map names modelling code of its own \(modeling_own"):
        plan(folder, groups=4, allow_slow=True, trust_remote_code=trust)


@pytest.mark.parametrize(
    ("code", "error", "why"),
    [
        (None, CheckpointError, "cannot be read"),
        ("import a_package_that_is_not_there", UnsupportedModelError, "cannot be imported"),
        ("def broken(:", UnsupportedModelError, "cannot be imported"),
        ("class XForCausalLM: pass", UnsupportedModelError, "no PreTrainedModel"),
    ],
)
def test_own_code_that_cannot_be_loaded_is_one_error(
    code: str | None, error: type[Exception], why: str, tmp_path: Path
) -> None:
    source = name_code(factories.make(tmp_path / f"broken{len(code or '')}"), "modeling_x.XForCausalLM")
    if code is not None:
        (source / "modeling_x.py").write_text(code)
    with pytest.raises(error, match=why):
        plan(source, groups=4, trust_remote_code=True)


def test_code_of_another_repository_needs_the_hub(tmp_path: Path, offline: None) -> None:
    source = factories.make(tmp_path / "m")
    entries = {"AutoConfig": "some-lab/x--configuration_x.XConfig", "AutoModelForCausalLM": "some-lab/x--modeling_x.X"}
    factories.change_config(source, auto_map=entries)
    assert plan(source, groups=4).groups == 4
    with pytest.raises((HubError, CheckpointError), match=r"some-lab/x|another repository"):
        plan(source, groups=4, trust_remote_code=True)


def test_an_inspection_names_code_that_was_not_run(tmp_path: Path, command: Command) -> None:
    source = name_code(factories.make(tmp_path / "m"), "modeling_x.XForCausalLM")
    finished = command("gqa", "inspect", source)
    assert finished.code == 0
    assert "own code not run" in finished.out
    assert "modeling_x.XForCausalLM" in finished.out
