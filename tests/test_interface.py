"""The package from Python: what the commands do, with results, callbacks and errors as Python has them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gqa_convert
from gqa_convert.checkpoint.embedded import CHECKPOINT
from gqa_convert.errors import UsageError
from gqa_convert.interface import as_arguments
from tests import factories
from tests.support import script_module

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gqa_convert.convert("demo", groups=2, out=tmp_path_factory.mktemp("c") / "mean").out


def test_names_are_listed_and_importing_is_light() -> None:
    assert set(gqa_convert.__all__) <= set(dir(gqa_convert))
    code = "import gqa_convert, sys; [getattr(gqa_convert, n) for n in ('Recipe', 'convert', 'evaluate')]"
    code += "; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_function_is_documented() -> None:
    for name in gqa_convert._INTERFACE:
        function = getattr(gqa_convert, name)
        assert callable(function)
        assert function.__doc__, name


def test_a_live_model_gives_a_live_model() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told: list[tuple[str, int, int]] = []
    smaller = gqa_convert.convert(model, groups=2, on_progress=lambda *what: told.append(what))
    assert type(smaller) is type(model)
    assert smaller.config.num_key_value_heads == 2
    assert (smaller.dtype, smaller.training) == (torch.bfloat16, True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    keys = before["model.layers.0.self_attn.k_proj.weight"].float()
    mean = keys.view(2, 4, -1, keys.shape[1]).mean(1).view(-1, keys.shape[1])
    assert torch.equal(smaller.model.layers[0].self_attn.k_proj.weight.float(), mean.bfloat16().float())
    what, done, total = told[-1]
    assert what == "writing"
    assert done == total > 0


def test_a_live_model_to_a_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    result = gqa_convert.convert(model, groups=4, out=tmp_path / "out")
    assert result.out == tmp_path / "out"
    assert result.to_dict()["plan"]["after"]["kv_heads"] == 4


def test_evaluation_and_its_table(converted: Path) -> None:
    told: list[tuple[str, int, int]] = []
    evaluation = gqa_convert.evaluate(
        "demo",
        converted,
        data="demo",
        context=64,
        stride=64,
        max_windows=4,
        on_progress=lambda *what: told.append(what),
    )
    assert told[-1] == ("windows", 4, 4)
    assert evaluation.to_dict() == evaluation.to_json()
    table = evaluation.to_pandas()
    assert list(table["kv_heads"]) == [8, 2]
    assert table["loss_difference"][1] == pytest.approx(table["loss"][1] - table["loss"][0])


def test_measured_as_it_is_converted(tmp_path: Path) -> None:
    result = gqa_convert.convert("demo", groups=4, out=tmp_path / "out", data="demo")
    assert result.quality is not None
    assert result.quality["loss_after"] > result.quality["loss_before"]
    assert "| loss, nats per token |" in (result.out / "README.md").read_text()


def test_bench_and_its_table(converted: Path) -> None:
    measured = gqa_convert.bench("demo", converted, batches=(1,), contexts=(16,), caches=("static",), steps=1, rounds=1)
    assert list(measured.to_pandas()["kv_heads"]) == [8, 2]


def test_packages_of_a_functions_name_are_called_through(converted: Path) -> None:
    import gqa_convert.evaluate.metrics
    import gqa_convert.report.words

    for name in ("evaluate", "report", "uptrain"):
        assert callable(getattr(gqa_convert, name))
    assert gqa_convert.evaluate(converted, data="demo", context=64, max_windows=1).base.kv_heads == 2
    with pytest.raises(UsageError, match="no such"):
        gqa_convert.report(converted / "nowhere")


def test_uptraining_from_a_dictionary(converted: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) + "\n" for i in range(60)))
    told: list[tuple[str, int, int]] = []
    result = gqa_convert.uptrain(
        {
            "model": str(converted),
            "output": str(tmp_path / "run"),
            "budget": {"steps": 2},
            "data": {"source": str(text), "context": 16, "held_out_fraction": 0.3},
            "schedule": {"kind": "cosine", "peak": 1e-4},
            "train": {"batch_sequences": 2, "precision": "float32", "device": "cpu"},
        },
        on_progress=lambda *what: told.append(what),
    )
    assert [done for what, done, total in told if what == "uptraining" and total == 2][-1] == 2
    assert result.to_pandas()["steps"][0] == 2


def test_errors_name_arguments(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "model")
    with pytest.raises(UsageError, match=r"^preset bset: did you mean best\?"):
        gqa_convert.convert(source, groups=2, preset="bset")
    with pytest.raises(UsageError, match=r"^max_windows 0: at least one window"):
        gqa_convert.evaluate("demo", data="demo", max_windows=0)
    with pytest.raises(UsageError, match=r"^max_window: no such argument. Did you mean max_windows\?"):
        gqa_convert.evaluate("demo", data="demo", max_window=1)
    with pytest.raises(UsageError, match="neither a folder"):
        gqa_convert.convert(3, groups=2)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="says all about the merge"):
        gqa_convert.convert(source, groups=2, preset="best", recipe=gqa_convert.Recipe())
    assert as_arguments("--no-measure, --calibration-length 3; a--b") == "measure, length 3; a--b"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = script_module(ROOT / "scripts" / "run_notebook.py").run(ROOT / "docs" / "quickstart.ipynb")
    outputs = ["".join(str(out) for out in cell.get("outputs", [])) for cell in notebook["cells"]]
    assert "loss_difference" in "".join(outputs)
    assert "'LlamaForCausalLM', 2" in outputs[-1]
