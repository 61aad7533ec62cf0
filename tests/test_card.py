"""The card that a conversion writes: the hub's metadata, what was done, what it cost, and whose card it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from gqa_convert import convert
from gqa_convert.checkpoint.embedded import CHECKPOINT
from gqa_convert.checkpoint.ownership import check_replaceable, is_signed, sign_card
from gqa_convert.conversion.card import refresh_card
from gqa_convert.conversion.inspect import verify_pair
from gqa_convert.errors import OutputError
from tests import factories
from tests.support import Command

SOURCE = """---
license: other
license_name: a-licence
license_link: LICENSE
language: [en, de]
datasets: [someone/texts]
base_model: someone/else
pipeline_tag: text-generation
---
# MHA, 8 heads
"""
FIGURES = {
    "sample": "a text",
    "tokens": 100,
    "loss_before": 2.0,
    "loss_after": 2.5,
    "perplexity_before": 7.389,
    "perplexity_after": 12.18,
    "verdict": "not usable as it is",
}


def data_of(folder: Path) -> ModelCardData:
    data = ModelCard((folder / "README.md").read_text()).data
    assert isinstance(data, ModelCardData)
    return data


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = factories.make(tmp_path / "model")
    (folder / "README.md").write_text(SOURCE)
    (folder / "LICENSE").write_text("as you like")
    return folder


def test_the_card_is_its_own_and_the_originals_goes_along(source: Path) -> None:
    out = convert(source, groups=2).out
    assert (out / "README-source.md").read_text() == SOURCE
    card = ModelCard((out / "README.md").read_text())
    data = card.data.to_dict()
    assert data["license"] == "other"
    assert (data["license_name"], data["license_link"]) == ("a-licence", "LICENSE")
    assert (data["language"], data["datasets"]) == (["en", "de"], ["someone/texts"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert "gqa" in data["tags"]
    assert "base_model" not in data, (
        "a folder is no hub model, and what the source came from is not what this came from"
    )
    for said in (
        "8 KV heads became 2",
        "**Not measured.**",
        "AutoModelForCausalLM",
        "README-source.md",
        "method mean",
        "vllm serve",
    ):
        assert said in card.text, said
    assert "MHA, 8 heads" not in card.text


def test_a_hub_models_card_names_its_relation(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    factories.make(snapshot)
    out = convert(snapshot, groups=2, out=tmp_path / "out").out
    data = data_of(out)
    values = data.to_dict()
    assert (values["base_model"], values["base_model_relation"]) == ("someone/tiny", "finetune")


def test_what_was_measured_is_in_the_card(source: Path) -> None:
    out = convert(source, groups=2).out
    assert refresh_card(out, FIGURES)
    results = {result.metric_type: result.metric_value for result in data_of(out).eval_results or []}
    assert results == {"loss": 2.5, "perplexity": 12.18}
    text = (out / "README.md").read_text()
    assert "| loss, nats per token | 2.0000 | 2.5000 |" in text
    assert "Not measured" not in text
    assert (out / "README-source.md").read_text() == SOURCE


def test_the_command_line_measures_into_the_card(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    finished = command("gqa", "convert", CHECKPOINT, "-g", 2, "-o", out, "--measure", "--json")
    assert finished.code == 0, finished.err
    quality = json.loads(finished.out)["quality"]
    results = data_of(out).eval_results or []
    assert {result.metric_value for result in results} == {quality["loss_after"], quality["perplexity_after"]}


def test_a_card_of_ours_may_be_replaced_and_an_edited_one_not(source: Path) -> None:
    out = convert(source, groups=2).out
    check_replaceable(out)
    refresh_card(out, FIGURES)
    check_replaceable(out)
    card = out / "README.md"
    card.write_text(card.read_text().replace("# model, 2 KV heads", "# My own words"))
    assert not refresh_card(out, FIGURES)
    with pytest.raises(OutputError, match=r"README\.md"):
        check_replaceable(out)
    with pytest.raises(OutputError, match=r"README\.md"):
        convert(source, groups=2, force=True)


def test_verifying_knows_the_cards(source: Path) -> None:
    out = convert(source, groups=2).out
    refresh_card(out, FIGURES)
    assert verify_pair(source, out)["identical"] == 17


def test_converting_a_conversion_keeps_the_first_original_card(source: Path) -> None:
    first = convert(source, groups=4).out
    second = convert(first, groups=2).out
    assert (second / "README-source.md").read_text() == SOURCE
    assert not (second / "README-source-2.md").exists()
    assert "4 KV heads became 2" in (second / "README.md").read_text()
    (first / "README.md").write_text("# What I found out\n")
    third = convert(first, groups=2, out=source.parent / "third").out
    assert (third / "README-source.md").read_text() == SOURCE
    assert (third / "README-source-2.md").read_text() == "# What I found out\n"


FRONTS = (
    "---\n[\n---\n",
    "---\n- a\n---\n",
    "---\nlicense: {a: 1}\nlanguage: 3\n---\n",
    "---",
    "",
    "\xff",
    "---\n&a [*a]\n---\n",
)


@pytest.mark.parametrize("front", FRONTS)
def test_any_card_of_a_source_is_survived(tmp_path: Path, front: str) -> None:
    source = factories.make(tmp_path / "model")
    (source / "README.md").write_bytes(front.encode("latin-1"))
    out = convert(source, groups=2).out
    data = ModelCard((out / "README.md").read_text()).data.to_dict()
    assert "license" not in data
    assert (out / "README-source.md").read_bytes() == front.encode("latin-1")


def test_a_mark_is_of_one_text() -> None:
    card = sign_card("# A\n")
    assert is_signed(card.encode())
    assert sign_card("# A") == card
    assert not is_signed(card.replace("# A", "# B").encode())
    assert not is_signed((card + "more\n").encode())
    assert not is_signed(b"")
