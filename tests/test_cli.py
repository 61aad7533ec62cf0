"""The commands: what they print for people and for machines, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gqa_convert
from gqa_convert import errors
from tests import factories
from tests.support import Command, tree


def test_convert_for_people(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "model")
    finished = command("gqa-convert", "--groups", 4, source)
    assert (finished.code, finished.err) == (0, "")
    for part in (
        "MHA (8 query heads, 8 KV heads of 8) -> GQA (8 query heads, 4 KV heads of 8)",
        "4 merged, 17 copied",
        "num_key_value_heads = 4",
        "1.0 KiB -> 512 B per token (0.5 of the source)",
        "up to 4 devices without replicating KV heads",
        f"wrote {tmp_path / 'model-gqa4'}",
    ):
        assert part in " ".join(finished.out.split()), part
    factories.load(tmp_path / "model-gqa4")


def test_convert_for_machines(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "model")
    finished = command("gqa", "convert", source, "--groups", 2, "--json", "--method", "first", "--verify", "logits")
    assert (finished.code, finished.err) == (0, "")
    described = json.loads(finished.out)
    assert described["out"] == str(tmp_path / "model-gqa2")
    assert described["verified"] == "logits"
    assert described["checks"]["tensors"] == 21
    assert described["plan"]["method"] == "first"
    assert described["plan"]["max_tensor_parallel"] == 2


@pytest.mark.parametrize("arguments", [("gqa-convert", "--dry-run"), ("gqa", "plan")])
def test_dry_run_prints_the_plan_and_writes_nothing(
    arguments: tuple[str, str], tmp_path: Path, command: Command
) -> None:
    source = factories.make(tmp_path / "model")
    before = tree(tmp_path)
    program, word = arguments
    finished = command(program, word, source, "--groups", 4)
    assert (finished.code, finished.err) == (0, "")
    assert f"target {tmp_path / 'model-gqa4'}" in " ".join(finished.out.split())
    one = " ".join(command(program, word, source, "--groups", 1).out.split())
    assert "1 KV head of 8)" in one
    assert "tensor parallel KV heads are copied to every device" in one
    described = json.loads(command(program, word, source, "--groups", 4, "--json").out)
    assert described.pop("forecast") is None
    assert described.pop("schema_version") == 1
    assert described == gqa_convert.plan(source, groups=4).to_json()
    assert tree(tmp_path) == before


def test_inspect(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "model", "olmo2")
    finished = command("gqa", "inspect", source)
    assert (finished.code, finished.err) == (0, "")
    for part in ("MHA (8 query heads, 8 KV heads of 8)", "KV cache, 1 group ", "KV cache, 2 groups "):
        assert part in finished.out
    inspected = json.loads(command("gqa", "inspect", source, "--json").out)
    assert inspected["model_type"] == "olmo2"
    assert inspected["class"] == "Olmo2ForCausalLM"
    assert (inspected["kind"], inspected["query_heads"], inspected["kv_heads"], inspected["head_dim"]) == (
        "MHA",
        8,
        8,
        8,
    )
    assert inspected["legal_groups"] == [1, 2, 4, 8]
    assert inspected["parameters"] == sum(x.numel() for x in factories.tensors_of(source).values())
    assert inspected["bytes"] == 4 * inspected["parameters"]
    per_head = 2 * 2 * 8 * 4
    assert inspected["kv_cache_bytes_per_token"] == {str(g): g * per_head for g in (1, 2, 4, 8)}
    assert inspected["converted_by"] == ""


def test_inspect_says_what_was_converted_and_what_is_refused(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "model")
    out = gqa_convert.convert(source, groups=2).out
    inspected = json.loads(command("gqa", "inspect", out, "--json").out)
    assert (inspected["kind"], inspected["legal_groups"]) == ("GQA", [1, 2])
    assert inspected["converted_by"] == f"gqa-convert {gqa_convert.__version__}"
    falcon = json.loads(command("gqa", "inspect", factories.make(tmp_path / "falcon", "falcon"), "--json").out)
    assert falcon["legal_groups"] == [1, 8]
    assert falcon["refused_groups"].keys() == {"2", "4"}
    assert "--groups 1" in falcon["refused_groups"]["4"]


def test_families(command: Command) -> None:
    finished = command("gqa", "families", "--json")
    assert finished.code == 0
    listed = {family["model_type"]: family for family in json.loads(finished.out)["families"]}
    assert len(listed) > 150
    assert {family["kind"] for family in listed.values()} <= set("ABCDN")
    assert {family["status"] for family in listed.values()} <= {"proven", "unproven", "untried", "refused", "nested"}
    assert all(family["reason"] for family in listed.values())
    assert listed["llama"]["kind"] == "A"
    assert listed["phi3"]["kind"] == "B"
    assert (listed["led"]["kind"], listed["led"]["status"]) == ("C", "refused")
    assert (listed["t5"]["kind"], listed["t5"]["status"]) == ("C", "proven")
    assert (listed["gpt2"]["kind"], listed["gpt2"]["status"]) == ("C", "proven")
    assert "only --groups 1" in listed["gpt2"]["reason"]
    assert "modeling_gqa.py" in listed["gpt2"]["reason"]
    assert listed["gpt_neox"]["reason"] == "written as phi or nemotron or starcoder2, no remote code"
    assert (listed["mamba"]["kind"], listed["mamba"]["status"]) == ("D", "refused")


def test_families_by_name(command: Command) -> None:
    finished = command("gqa", "families", "stablelm")
    assert finished.code == 0
    assert "stablelm" in finished.out
    assert "llama" not in finished.out


def test_methods(command: Command) -> None:
    listed = json.loads(command("gqa", "methods", "--json").out)["methods"]
    names = [method["name"] for method in listed]
    assert names == sorted(names)
    assert {"mean", "first", "random"} <= set(names)
    assert all(method["title"] and method["reference"] for method in listed)
    shown = command("gqa", "methods")
    assert shown.code == 0
    assert all(name in shown.out for name in names)


def test_version(command: Command) -> None:
    assert command("gqa", "--version").out == f"gqa-convert {gqa_convert.__version__}\n"


@pytest.mark.parametrize("program", ["gqa", "gqa-convert"])
def test_help_names_every_option(program: str, command: Command) -> None:
    arguments = ("convert", "--help") if program == "gqa" else ("--help",)
    finished = command(program, *arguments)
    assert finished.code == 0
    for option in ("--groups", "--out", "--method", "--seed", "--dry-run", "--json", "--force", "--verify"):
        assert option in finished.out


def test_unknown_options_and_missing_ones_are_usage_errors(tmp_path: Path, command: Command) -> None:
    assert command("gqa-convert", tmp_path, "--groups", 4, "--nonsense").code == 2
    assert command("gqa-convert", tmp_path).code == 2
    assert command("gqa-convert", tmp_path, "--groups", "many").code == 2
    assert command("gqa", "nonsense").code == 2


def test_every_kind_of_error_has_an_exit_code_of_its_own() -> None:
    kinds: list[Any] = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__name__.endswith("Error")
    ]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert all(issubclass(kind, errors.GQAConvertError) for kind in kinds)
    assert 0 not in codes


@pytest.mark.parametrize(
    "program", [["-m", "gqa_convert.cli", "convert"], [str(Path(sys.executable).with_name("gqa-convert"))]]
)
def test_both_ways_to_start_it(program: list[str], tmp_path: Path) -> None:
    start = [sys.executable, *program] if program[0] == "-m" else program
    if program[0] != "-m" and not Path(program[0]).exists():
        pytest.skip("the package is not installed")
    finished = subprocess.run(
        [*start, str(tmp_path / "nowhere"), "--groups", "4"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert finished.stderr == f"error: {tmp_path / 'nowhere'}: no such folder.\n"
    assert finished.stdout == ""


def test_sizes_have_units() -> None:
    from gqa_convert.console import size

    assert [size(n) for n in (0, 1023, 1024, 1536, 2**20, 3 * 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "3.0 GiB",
        "2048.0 GiB",
    ]


def test_progress_off_a_terminal_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gqa_convert import progress

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.conversion_progress(4096, quiet=False) as (on_bytes, _):
        for _ in range(4):
            on_bytes(1024)
            now[0] += 40.0
    assert capsys.readouterr().err.splitlines() == ["written 3.0 KiB of 4.0 KiB, about 27 s left"]


def test_quiet_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from gqa_convert import progress

    with progress.conversion_progress(4096, quiet=True) as (on_bytes, _):
        on_bytes(4096)
    assert capsys.readouterr() == ("", "")
