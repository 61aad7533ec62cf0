"""The optimisers are rows: what one of them says is what configuration, plan and training loop go by."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gqa_convert.errors import UsageError
from gqa_convert.uptrain import optim, zero
from gqa_convert.uptrain.config import OptimizerSection
from gqa_convert.uptrain.loop import uptrain
from gqa_convert.uptrain.model import head_sides
from gqa_convert.uptrain.muon import orthogonal
from gqa_convert.uptrain.optim import Optimizer, make_optimizer
from gqa_convert.uptrain.plan import plan_rows, resolve
from gqa_convert.uptrain.read_config import parse_config


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(optim, "_OPTIMIZERS", dict(optim._OPTIMIZERS))
    optimizers = []

    def make(groups: list[dict[str, Any]], settings: OptimizerSection) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD(groups, lr=0.0, momentum=settings.betas[0]))
        return optimizers[-1]

    optim.register(Optimizer(name="toy", make=make, state_bytes=4, whole_matrices=True))
    return optimizers


def test_a_new_row_is_configured_planned_and_trained_with(settings: dict[str, Any], toy: list[Any]) -> None:
    settings |= {"optimizer": {"kind": "toy"}, "schedule": {"kind": "constant", "peak": 0.3}, "budget": {"steps": 12}}
    config = parse_config(settings)
    plan = resolve(config)
    assert plan.budget.checkpoint_bytes == plan.shape.parameters * (4 + 4)
    assert dict(plan_rows(plan))["optimizer"].startswith("toy,")
    assert any("optimizer.kind=toy needs whole matrices" in line for line in zero._conflicts(config))
    result = uptrain(config)
    assert len(toy) == 1
    assert toy[0].param_groups[0]["lr"] == 0.3
    assert result.loss_after < result.loss_before
    assert (Path(settings["output"]) / "final" / "model.safetensors").is_file()


def test_an_unknown_optimizer_is_named_with_those_there_are(settings: dict[str, Any]) -> None:
    settings["optimizer"] = {"kind": "adam"}
    with pytest.raises(UsageError, match=r"optimizer\.kind='adam': choose one of adamw, adafactor"):
        parse_config(settings)
    with pytest.raises(ValueError, match="registered twice"):
        optim.register(optim.get_optimizer("adamw"))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_row_says_how_much_state_it_keeps(name: str) -> None:
    """Bytes per parameter as they are after a step, up to what a large matrix makes of rows and columns."""
    model = torch.nn.Linear(256, 512, bias=False)
    optimizer = make_optimizer(model, OptimizerSection(kind=name))
    optim.set_learning_rate(optimizer, 1e-3)
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    held = sum(tensor.nbytes for tensor in tensors) / model.weight.numel()
    assert held == pytest.approx(optim.get_optimizer(name).state_bytes, abs=0.05)


def test_muon_takes_the_matrices_inside_and_adamw_the_rest(tiny_folder: Path) -> None:
    """As torch's own two would, each over its part, through a state that was saved and loaded."""
    model, other = (AutoModelForCausalLM.from_pretrained(tiny_folder) for _ in range(2))
    settings = OptimizerSection(kind="muon", weight_decay=0.1, per_head=False)
    optimizer = make_optimizer(model, settings)
    named = dict(other.named_parameters())
    inner = [
        value for name, value in named.items() if value.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    assert len(inner) > 10
    rest: dict[int, Any] = {
        id(value): value for value in named.values() if all(value is not matrix for matrix in inner)
    }
    output = other.get_output_embeddings().weight
    assert output is not other.get_input_embeddings().weight
    decayed: dict[str, Any] = {
        "params": [rest.pop(id(output))],
        "weight_decay": 0.1,
    }  # embeddings are not, see `make_optimizer`
    parts = [
        torch.optim.Muon(inner, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([decayed, {"params": list(rest.values())}], lr=0.01, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    ids = torch.arange(24)[None] % 50
    for step in range(4):
        optim.set_learning_rate(optimizer, 0.01)
        for trained in (model, other):
            trained.zero_grad()
            trained(ids, labels=ids).loss.backward()
        optimizer.step()
        for part in parts:
            part.step()
        if step == 1:
            kept = copy.deepcopy(optimizer.state_dict())
            optimizer = make_optimizer(model, settings)
            optimizer.load_state_dict(kept)
    for name, value in model.named_parameters():
        assert torch.equal(value, named[name]), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_outside_attention_learns_at_its_share_of_the_rate(tiny_folder: Path, kind: str) -> None:
    """A step of AdamW or Muon is as large as its rate, so shares of the rate are shares of the step."""
    steps: list[dict[str, float]] = []
    for share in (1.0, 0.25):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer = make_optimizer(model, OptimizerSection.model_validate({"kind": kind, "outside_attention": share}))
        kept = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(kept)
        optim.set_learning_rate(optimizer, 0.01)
        ids = torch.arange(24)[None] % 50
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        steps.append({name: float((value.detach() - before[name]).norm()) for name, value in model.named_parameters()})
    for name, whole in steps[0].items():
        assert whole > 0, name
        expected = 1.0 if "self_attn" in name else 0.25
        assert steps[1][name] / whole == pytest.approx(expected, rel=1e-3), name


def test_a_relative_step_is_as_large_as_the_rate_beside_its_matrix(tiny_folder: Path) -> None:
    """Queries' weights of a tenth of the size move by a tenth, where a plain step moves all alike."""
    moved: dict[bool, dict[str, float]] = {}
    for relative in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "q_proj" in name:
                    value.mul_(0.1)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer = make_optimizer(model, OptimizerSection(kind="muon", relative=relative, muon_dtype="float32"))
        ids = torch.arange(24)[None] % 50
        model(ids, labels=ids).loss.backward()
        optim.set_learning_rate(optimizer, 0.01)
        optimizer.step()
        moved[relative] = {
            name: float((value.detach() - before[name]).norm() / before[name].norm())
            for name, value in model.named_parameters()
            if "_proj" in name
        }
    for name, share in moved[True].items():
        assert share < 0.0125, (
            "the five rounds leave singular values between 0.7 and 1.2, fewer where a gradient has few"
        )
        if "o_proj" in name or "q_proj" in name:
            assert share > 0.006, name
        size = float(dict(before)[name].pow(2).mean().sqrt())
        assert moved[False][name] * size / 0.2 == pytest.approx(share, rel=1e-4), name


def test_muon_takes_each_head_apart_where_that_is_asked_for(tiny_folder: Path) -> None:
    """Every head moves as a matrix of its own does by torch's Muon, whichever side of the weight it lies along."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerSection(kind="muon", per_head=True))
    ids = torch.arange(24)[None] % 50
    model(ids, labels=ids).loss.backward()
    optim.set_learning_rate(optimizer, 0.01)
    optimizer.step()
    seen = set()
    for name, value in model.named_parameters():
        part = name.split(".")[-2]
        if part not in {"q_proj", "k_proj", "v_proj", "o_proj"} or value.ndim < 2:
            continue
        seen.add(part)
        side, width = (1, model.config.head_dim) if part == "o_proj" else (0, model.config.head_dim)
        assert value.shape[side] > width or part in {"k_proj", "v_proj"}
        for start in range(0, value.shape[side], width):
            alone = torch.nn.Parameter(before[name].narrow(side, start, width).clone())
            assert value.grad is not None
            alone.grad = value.grad.narrow(side, start, width).clone()
            torch.optim.Muon([alone], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
            step = (alone - before[name].narrow(side, start, width)).norm()
            away = (value.detach().narrow(side, start, width) - alone).norm()
            assert away < 0.05 * step, "more than bfloat16 rounds"
    assert len(seen) == 4


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("shape", [(24, 24), (40, 8), (8, 40)])
def test_muons_products_keep_the_singular_vectors(shape: tuple[int, int], dtype: torch.dtype, rounding: float) -> None:
    """Jordan et al. 2024: singular values between 0.7 and 1.2, vectors as they were; to what the dtype rounds."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    turned = u.T @ orthogonal(x[None], dtype)[0].float() @ vh.T
    found = turned.diagonal()
    large = values > 0.05 * values[0]
    assert ((found > 0.6) & (found < 1.25))[large].all()
    assert (turned - found.diag()).abs().max() < rounding


def test_heads_are_found_in_weights_that_are_stored_the_other_way_round() -> None:
    """GPT-2's Conv1D; a weight without heads, or whose attention states no width, has no side."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=40, n_positions=16))
    names = {id(value): name for name, value in model.named_parameters()}
    sides = {names[key]: value for key, value in head_sides(model).items()}
    assert sides == {
        "transformer.h.0.attn.c_attn.weight": (1, 8),
        "transformer.h.0.attn.c_proj.weight": (0, 8),
    }
    assert head_sides(torch.nn.Linear(8, 8)) == {}
