"""Where two models differ: tokens are sorted by what they are, sums add up, and the command and the page show it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from gqa_convert.cli.show_evaluation import show_evaluation
from gqa_convert.evaluate import examples as ex
from gqa_convert.evaluate import text
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.places import Places, kind_of
from gqa_convert.evaluate.results import KINDS, Evaluation
from gqa_convert.evaluate.scoring import WindowSums
from gqa_convert.report.tables import quality


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (" geese", "word"),
        ("na", "word"),
        ("ï", "word"),
        ("\ufffd", "word"),
        ("鹅", "word"),
        (" 42", "number"),
        ("x2", "number"),
        (" —", "punctuation"),
        ("():", "punctuation"),
        ("\n\n", "white space"),
        ("", "white space"),
    ],
)
def test_kinds(piece: str, kind: str) -> None:
    assert kind_of(piece) == kind


@pytest.fixture(scope="module")
def evaluation(llama: Path, llama_gqa2: Path, lines: Path) -> Evaluation:
    settings = EvalSettings(data=str(lines), context=40, stride=40, max_windows=6, caches=("int8",))
    return evaluate(llama, [llama_gqa2], settings)


def test_words_begin_and_go_on(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    stream = text.encode(["One goose, 7 (cold) seas\n"], tokenizer)
    examples = ex.causal_examples(stream, text.windows(len(stream.ids), context=len(stream.ids), stride=1))
    places = Places(tokenizer, examples)
    sums = WindowSums()
    batch = next(ex.batches(examples, 8))
    ones = torch.ones(batch.targets.shape, dtype=torch.float64)
    places.add(sums, batch, {"loss": ones * batch.scored})
    counts = dict(zip(places.names, sums.part_tokens[0].tolist(), strict=True))
    # A token per byte: "One" begins with O behind <s>; a space is a token of its own, so that each word begins bare.
    assert {kind: counts["kind", kind] for kind in KINDS} == {
        "word": 4,  # O, g, c, s
        "word piece": 2 + 4 + 3 + 3,
        "number": 1,
        "punctuation": 3,
        "white space": 4 + 1,
        "special": 1,  # </s>
    }
    assert counts["position", "1-15"] == 15
    assert counts["position", "16-31"] == len(stream.ids) - 1 - 15
    assert torch.equal(sums.part_sums["loss"][0], sums.part_tokens[0])


def test_parts_add_up_to_the_whole(evaluation: Evaluation) -> None:
    for comparison in (*evaluation.converted, *evaluation.quantised):
        for by in ("kind", "position"):
            parts = [part for part in comparison.parts if part.by == by]
            assert sum(part.tokens for part in parts) == evaluation.tokens
            assert sum(part.kl_share for part in parts) == pytest.approx(1.0)
            for name in ("kl", "loss_difference", "top1_agreement"):
                total = sum(getattr(part, name).value * part.tokens for part in parts)
                assert total / evaluation.tokens == pytest.approx(comparison.figures[name].value, abs=1e-9)
            before = sum(part.loss * part.tokens for part in parts) / evaluation.tokens
            assert before == pytest.approx(evaluation.base.loss)
        assert [part.name for part in comparison.parts if part.by == "position"] == ["1-15", "16-31", "32-63"]


def test_intervals_hold_their_values_and_json_goes_back(evaluation: Evaluation) -> None:
    for part in evaluation.converted[0].parts:
        for figure in (part.loss_difference, part.kl, part.top1_agreement):
            assert figure.interval is not None
            assert figure.interval[0] - 1e-9 <= figure.value <= figure.interval[1] + 1e-9
    values = json.loads(json.dumps(evaluation.to_json()))
    assert Evaluation.from_json(values).converted[0].parts == evaluation.converted[0].parts
    del values["converted"][0]["parts"]
    assert Evaluation.from_json(values).converted[0].parts == ()
    values["converted"][0]["parts"] = [{"by": "kind", "name": "word"}]
    with pytest.raises(ValueError, match=r"parts\.0"):
        Evaluation.from_json(values)


def test_a_copy_differs_nowhere(llama: Path, lines: Path) -> None:
    settings = EvalSettings(data=str(lines), context=40, stride=40, max_windows=2)
    copied = evaluate(llama, [llama], settings).converted[0]
    assert {part.kl_share for part in copied.parts} == {0.0}
    assert {part.top1_agreement.value for part in copied.parts} == {1.0}


def test_terminal_and_page_show_it(evaluation: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    show_evaluation(evaluation)
    assert re.search(r"tiny-llama-gqa2: of its KL, word piece \d+%", " ".join(capsys.readouterr().out.split()))
    (table,) = quality(evaluation).where
    assert table.caption == "Where tiny-llama-gqa2 differs"
    assert {len(row.cells) for row in table.rows} == {len(table.head)}
    assert {"word piece", "behind 16 to 31 tokens"} <= {row.cells[0] for row in table.rows}
