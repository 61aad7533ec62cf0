"""The suite: items are what they say, code is confined, likelihoods are lm-eval's, and the command shows it all."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.conversion.execute import convert
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.metrics import SUITE, rows
from gqa_convert.evaluate.results import Evaluation
from gqa_convert.evaluate.suite.answering import agreed, greedy, likelihoods, until
from gqa_convert.evaluate.suite.code_items import ITEMS
from gqa_convert.evaluate.suite.items import (
    CHOICES,
    GENERATED,
    arithmetic,
    code,
    continuations,
    copying,
    repair,
    write_lm_eval_task,
)
from gqa_convert.evaluate.suite.run import KINDS, SuiteSettings
from gqa_convert.evaluate.suite.sandbox import can_confine, passes
from tests.evaluate.tiny import LINES, write_llama

WORDS = " ".join(LINES).split()
needs_confining = pytest.mark.skipif(not can_confine(), reason="code cannot be confined here")


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, made for 2,048 tokens: its tokenizer has a token per byte."""
    folder = write_llama(tmp_path_factory.mktemp("suite") / "long-llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="module")
def loaded(long_llama: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(long_llama, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(long_llama)


def test_continuations_hold_the_true_one_and_others_from_elsewhere() -> None:
    items = continuations(WORDS, count=20)
    text = " ".join(WORDS)
    assert items == continuations(WORDS, count=20)
    assert items != continuations(WORDS, count=20, seed=1)
    assert {item.answer for item in items} == set(range(CHOICES))
    for item in items:
        assert item.context + item.choices[item.answer] in text
        assert len(set(item.choices)) == CHOICES
        assert all(choice[1:] in text for choice in item.choices)
    with pytest.raises(UsageError, match="250 words of plain text are needed"):
        continuations(WORDS[:100], count=1)
    with pytest.raises(UsageError, match="repeats itself"):
        continuations(["over", "again"] * 200, count=1)


def test_sums_copies_and_repairs_take_the_right_answer_alone() -> None:
    for item in arithmetic(WORDS, count=30):
        a, sign, b, _ = item.prompt.rsplit("\n", 1)[1].split()
        value = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert value >= 0
        assert item.right(f" {value}")
        assert not item.right(f" {value + 1}")
    for item in copying(WORDS, count=10):
        line = item.prompt.rsplit("Line: ", 1)[1].removesuffix("\nCopy:")
        assert item.right(f" {line}")
        assert not item.right(f" {line[:-1]}")
    for item in repair(WORDS, count=30):
        broken = item.prompt.rsplit("Broken: ", 1)[1].removesuffix("\nRepaired:")
        assert not item.right(f" {broken}"), broken
        shown = [line.removeprefix("Repaired: ") for line in item.prompt.splitlines() if line.startswith("Repaired: ")]
        assert len(shown) == 3
        assert all(json.loads(line) for line in shown)


@needs_confining
def test_functions_pass_with_their_solution_and_not_without() -> None:
    assert len(ITEMS) == 20
    asked = code(WORDS, count=100)
    assert [item.right(known.solution) for item, known in zip(asked, ITEMS, strict=True)] == [True] * 20
    assert not any(item.right("    return None\n") for item in asked[:3])
    assert not asked[0].right("    return [")


@needs_confining
@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.socket()",
        "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)",
        "import os\nif os.fork() == 0:\n    os._exit(0)",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "open('written', 'w')",
        "import os\nos.remove(VICTIM)",
        "open(VICTIM, 'a')",
        "import os\nos.rename(VICTIM, VICTIM + 'x')",
        "import os\nos.truncate(VICTIM, 0)",
        "import os\nos.chmod(VICTIM, 0)",
        "import os, pathlib\npathlib.Path('folder').mkdir()",
        "import os\nos.kill(os.getppid(), 0)",
        "import threading\nthreading.Thread(target=print).start()",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
        "x = bytearray(3 << 30)",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import os\nfor _ in range(100): os.write(1, b'x' * (1 << 16))",
    ],
)
def test_code_is_confined(code: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    assert not passes(f"VICTIM = {str(victim)!r}\n{code}", "")
    assert victim.read_text() == "whole"
    assert victim.stat().st_mode & 0o400


@needs_confining
def test_code_that_does_not_end_is_ended_and_ordinary_code_runs() -> None:
    assert not passes("while True: pass", "", limit_s=0.5)
    assert not passes("import time\ntime.sleep(60)", "", limit_s=0.5)
    assert passes("import math, re, itertools, collections\nprint('said')", "assert math.pi > 3")


def test_greedy_is_the_first_choice_token_by_token(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = [tokenizer(text)["input_ids"] for text in ("grey geese", "cold seas!", "a")]
    written = greedy(model, tokenizer, prompts, tokens=6, batch=4)
    for prompt, own in zip(prompts, written, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.inference_mode():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert own == ids[len(prompt) :]
    first = tokenizer.decode(written[0][:1])
    stopped = greedy(model, tokenizer, prompts[:1], tokens=6, stops=(first,), batch=1)
    assert stopped[0] == written[0][:1]


def test_a_checkpoints_settings_bend_nothing(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = [tokenizer("grey geese")["input_ids"]]
    plain = greedy(model, tokenizer, prompts, tokens=12, batch=1)
    own = model.generation_config
    bent = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "eos_token_id": plain[0][2]}
    model.generation_config = GenerationConfig(**bent, pad_token_id=0)
    try:
        assert greedy(model, tokenizer, prompts, tokens=12, batch=1) == plain
        ended = greedy(model, tokenizer, prompts, tokens=12, stops=("never",), batch=1)[0]
        assert ended == plain[0][: plain[0].index(plain[0][2]) + 1], "its end token ends a text that may end"
        assert model.generation_config.repetition_penalty == 5.0, "what the model asks for is put back"
    finally:
        model.generation_config = own


def test_likelihoods_are_sums_over_the_continuation(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    item = continuations(WORDS, count=1)[0]
    values = likelihoods(model, tokenizer, item)
    with torch.inference_mode():
        for choice, value in zip(item.choices, values, strict=True):
            ids = tokenizer(item.context + choice)["input_ids"]
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(ids) - len(choice.encode())
            assert sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids))) == pytest.approx(value, abs=1e-3)


def test_small_helpers() -> None:
    assert until("a\nb\n\nc", ("\n\n", "\nb")) == "a"
    assert until("abc", ("x",)) == "abc"
    assert (agreed([1, 2, 3], [1, 2, 4]), agreed([1], [1]), agreed([], [1])) == (2, 1, 0)


def test_every_kind_has_a_row() -> None:
    names = {row.name for row in rows()}
    assert {f"suite_{kind}" for kind in KINDS} <= names
    assert set(SUITE) == {*GENERATED, "continuations", "continuations_by_length"}


def test_the_command_and_the_page_show_it(long_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    made = convert(long_llama, groups=2, out=tmp_path / "gqa2").out
    out = tmp_path / "run" / "eval.json"
    out.parent.mkdir()
    arguments = ["eval", str(long_llama), str(made), "--data", str(data), "--context", "64", "--max-windows", "2"]
    arguments += ["--suite-kinds", "continuations,agreement,arithmetic", "--suite-items", "3", "--out", str(out)]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for label in ("greedy agreement", "continuations by length", "arithmetic, change"):
        assert label in shown.output
    evaluation = Evaluation.from_json(json.loads(out.read_text()))
    assert len(evaluation.suite) == 2 * 4
    of_itself = next(r for r in evaluation.suite if r.kind == "agreement" and r.model == "long-llama")
    assert of_itself.scores == (64.0,) * 3
    pair = evaluation.converted[0].figures
    agreement = next(r for r in evaluation.suite if r.kind == "agreement" and r.model == "gqa2")
    assert pair["suite_agreement"].value == pytest.approx(sum(agreement.scores) / 3)
    assert len(agreement.written) == 3
    assert "suite_arithmetic_difference" in pair
    paged = CliRunner().invoke(app, ["report", str(out.parent)])
    assert paged.exit_code == 0, paged.output
    page = "".join(page.read_text() for page in out.parent.rglob("*.html"))
    assert "--suite --suite-kinds=continuations,agreement,arithmetic --suite-items 3 --suite-seed 0" in page
    assert page.index("Quality of the conversions") < page.index("what they answer") < page.index("arithmetic, change")


def test_what_does_not_go_is_refused(llama: Path, lines: Path) -> None:
    with pytest.raises(UsageError, match="--suite-kinds poetry: choose from continuations"):
        SuiteSettings(kinds=("poetry",))
    refused = CliRunner().invoke(
        app, ["eval", str(llama), "--data", str(lines), "--max-windows", "1", "--suite-kinds", "copying"]
    )
    assert isinstance(refused.exception, UsageError)
    assert "tiny-llama is made for 64. Leave it out by --suite-kinds" in str(refused.exception)


LM_EVAL = Path(__file__).parents[2] / "scripts" / "clients" / "lm_eval_choices.py"


@pytest.mark.clients
def test_lm_eval_gives_the_same_numbers_of_the_same_items(long_llama: Path, tmp_path: Path) -> None:
    if "GQA_CLIENTS" not in os.environ:
        pytest.skip("GQA_CLIENTS is not set; see scripts/clients/setup.sh")
    items = continuations(WORDS, count=24)
    write_lm_eval_task(items, tmp_path)
    python = Path(os.environ["GQA_CLIENTS"]).absolute() / "clients" / "bin" / "python"
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    variables.pop("PYTHONPATH", None)
    command = [str(python), str(LM_EVAL), str(long_llama), str(tmp_path), "continuations"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    answer = json.loads(line.removeprefix("ANSWER "))
    theirs, scores = answer["likelihoods"], answer["results"]
    model = AutoModelForCausalLM.from_pretrained(long_llama, dtype=torch.float32).eval()
    ours = [likelihoods(model, AutoTokenizer.from_pretrained(long_llama), item) for item in items]
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)
    right = [values.index(max(values)) == item.answer for values, item in zip(ours, items, strict=True)]
    assert sum(right) / len(right) == pytest.approx(scores["acc,none"], abs=1e-4)
    by_length = [
        [v / len(c) for v, c in zip(vs, item.choices, strict=True)] for vs, item in zip(ours, items, strict=True)
    ]
    right = [values.index(max(values)) == item.answer for values, item in zip(by_length, items, strict=True)]
    assert sum(right) / len(right) == pytest.approx(scores["acc_norm,none"], abs=1e-4)
