"""Recall: items are as long as asked and hold what is told; right is what greedy generation writes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.metrics import RECALL
from gqa_convert.evaluate.recall import HOPS, KEYS, make_item, make_items, right, with_figures
from gqa_convert.evaluate.results import Evaluation, Recall
from tests.evaluate.tiny import LINES, write_llama, write_tokenizer

TEXT = " ".join(LINES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, made for 512 tokens: its tokenizer has a token per byte."""
    folder = write_llama(tmp_path_factory.mktemp("recall") / "long-llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.mark.parametrize("kind", RECALL)
def test_items_have_the_length_and_hold_all_that_is_told_in_order(tokenizer: Any, kind: str) -> None:
    text_ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    items = make_items(kind, tokenizer, text_ids, 500, count=6)
    assert {len(ids) for ids, _ in items} == {500}
    assert items == make_items(kind, tokenizer, text_ids, 500, count=6)
    for ids, length in items:
        words = tokenizer.decode(ids)
        assert ids[0] == tokenizer.bos_token_id
        number = re.fullmatch(r" (\d{5})", tokenizer.decode(ids[-length:]))
        assert number is not None
        told = words[: -len(words.rsplit("\n", 1)[1])]
        assert number[1] in told
        pattern = (
            r"\nVAR \w = (?:VAR \w|\d{5})\.\n"
            if kind == "variables"
            else r"\nThe special magic number for \w+ is \d{5}\.\n"
        )
        assert len(re.findall(pattern, told)) == {"needle": 1, "keys": KEYS, "variables": 2 * HOPS}[kind]


def test_the_depths_go_from_the_beginning_to_the_end(tokenizer: Any) -> None:
    text_ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    items = make_items("needle", tokenizer, text_ids, 400, count=4)
    places = [tokenizer.decode(ids).index("\nThe special") / 400 for ids, _ in items]
    assert places == sorted(places)
    assert places[0] < 0.05
    assert places[-1] > 0.5


@pytest.mark.parametrize("seed", range(20))
def test_following_the_variables_gives_the_answer(seed: int) -> None:
    item = make_item("variables", random.Random(seed))
    values: dict[str, str] = {}
    for line in item.told:
        name, value = re.fullmatch(r"VAR (\w) = (.*)\.", line).groups()
        values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR ") else value
    asked = re.search(r"VAR (\w),", item.asked)
    assert asked is not None
    assert f" {values[asked[1]]}" == item.answer
    assert len(values) == 2 * HOPS


class Copies(torch.nn.Module):
    """Says what followed the same three tokens before: finds every needle, and no variable but by luck."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        ids = input_ids[0].tolist()
        logits = torch.zeros(1, len(ids), 300)
        seen: dict[tuple[int, ...], int] = {}
        for t in range(3, len(ids)):
            logits[0, t, seen.get(tuple(ids[t - 2 : t + 1]), 0)] = 1.0
            seen[tuple(ids[t - 3 : t])] = ids[t]
        return SimpleNamespace(logits=logits)


def test_a_model_that_copies_finds_needles_and_no_variables(tokenizer: Any) -> None:
    text_ids = tokenizer("grey geese and cold seas, over and over, " * 3, add_special_tokens=False)["input_ids"]
    hits = {k: right(Copies(), make_items(k, tokenizer, text_ids, 500, count=8)) for k in ("needle", "variables")}
    assert sum(hits["needle"]) >= 4
    assert not any(hits["variables"])


def test_right_is_what_greedy_generation_writes(long_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(long_llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(long_llama)
    text_ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    items = make_items("needle", tokenizer, text_ids, 200, count=3)
    written = []
    for ids, length in items:
        prompt = torch.tensor([ids[:-length]])
        out = model.generate(prompt, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0)
        written.append(out[0].tolist())
    answered = right(model, [(ids, len(ids) - 200 + length) for (_, length), ids in zip(items, written, strict=True)])
    assert answered == [True] * 3, "its own continuation"
    assert right(model, items) == [ids == own for (ids, _), own in zip(items, written, strict=True)]


def test_shares_and_paired_differences_are_figures(llama: Path, llama_gqa2: Path, lines: Path) -> None:
    evaluation = evaluate(llama, [llama_gqa2], EvalSettings(data=str(lines), max_windows=2))
    recall = [
        Recall(model=name, kind=kind, context=context, right=right_ones)
        for name, right_ones in (("tiny-llama", (True, True)), ("tiny-llama-gqa2", (True, False)))
        for context in (100, 200)
        for kind in RECALL
    ]
    added = with_figures(evaluation, recall)
    assert added.base.figures["recall_needle"].value == 1.0
    difference = added.converted[0].figures["recall_keys_difference"]
    assert difference.value == -0.5
    assert difference.interval is not None
    assert -1.0 <= difference.interval[0] < -0.5 < difference.interval[1] <= 0.0
    again = Evaluation.from_json(json.loads(json.dumps(added.to_json())))
    assert again.recall == added.recall
    assert again.converted[0].figures["recall_keys_difference"] == difference


def test_the_command_and_the_page_show_it(long_llama: Path, lines: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(long_llama), "--data", str(lines), "--context", "64", "--max-windows", "2"]
    out = tmp_path / "run" / "eval.json"
    out.parent.mkdir()
    shown = CliRunner().invoke(app, [*arguments, "--recall", "350", "--recall-items", "2", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"variables, 350 +0 of 2", shown.output)
    assert "recall: needle" in shown.output
    paged = CliRunner().invoke(app, ["report", str(out.parent)])
    assert paged.exit_code == 0, paged.output
    page = "".join(page.read_text() for page in out.parent.rglob("*.html"))
    assert "variables, 350" in page
    assert "--recall=350 --recall-items 2" in page


@pytest.mark.parametrize(("context", "message"), [("1k", "made for 512 tokens"), ("60", "too few tokens")])
def test_lengths_that_do_not_fit_are_refused(long_llama: Path, lines: Path, context: str, message: str) -> None:
    arguments = ["eval", str(long_llama), "--data", str(lines), "--context", "64", "--max-windows", "2"]
    shown = CliRunner().invoke(app, [*arguments, "--recall", context])
    assert isinstance(shown.exception, UsageError)
    assert message in str(shown.exception)
