"""Every command x option: one spelling and one meaning for each thing, as docs/commands.md says it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gqa_convert.console import talking
from tests import factories
from tests.support import Command, script_module

ROOT = Path(__file__).parents[1]

# On which commands an option must be, besides those that it is on already; None: on every one.
EVERYWHERE = ("--json", "--quiet", "--verbose")
MODELS = ("convert", "plan", "inspect", "verify", "eval", "bench", "sweep")
REQUIRED: dict[str, tuple[str, ...]] = {
    "--token": (*MODELS, "heal", "report", "uptrain export"),
    "--trust-remote-code": (*MODELS, "heal", "uptrain export"),
    "--revision": MODELS,
    "--device": ("convert", "verify", "eval", "bench", "sweep"),
    "--dtype": ("convert", "verify", "eval", "bench", "sweep"),
    "--out": ("convert", "plan", "demo", "eval", "bench", "sweep", "heal", "uptrain export"),
    "--force": ("convert", "heal", "uptrain export"),
    "--dry-run": ("convert", "heal", "uptrain run"),
    "--data": ("convert", "eval", "sweep"),
}
# Options that take another kind of value, or other words, on some commands; anything else is the same everywhere.
OTHER_WORDS = {
    "--out",
    "--dtype",
    "--data",
    "--tokens",
    "--context",
    "--groups",
    "--kv-budget",
    "--seed",
    "--work",
    "--batch",
}
OTHER_WORDS |= {"--engine", "--refit", "--cache-context", "--steps"}
OTHER_KIND = {"--groups": "a list, where many are tried"}


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return script_module(ROOT / "scripts" / "commands_table.py")


@pytest.fixture(scope="module")
def options(table: ModuleType) -> dict[str, dict[str, Any]]:
    return {name.removeprefix("gqa "): table.options(command) for name, command in table.commands()}


def test_the_page_is_what_the_command_line_says(table: ModuleType) -> None:
    assert table.PAGE.read_text("utf-8") == table.page(), "run scripts/commands_table.py"


def test_every_command_says_what_it_must(options: dict[str, dict[str, Any]]) -> None:
    missing = [f"{name} {option}" for name, own in options.items() for option in EVERYWHERE if option not in own]
    missing += [
        f"{name} {option}" for option, names in REQUIRED.items() for name in names if option not in options[name]
    ]
    assert missing == []


def test_an_option_means_one_thing(options: dict[str, dict[str, Any]]) -> None:
    helps: dict[str, set[str]] = {}
    kinds: dict[str, set[str]] = {}
    letters: dict[str, set[str]] = {}
    for own in options.values():
        for name, option in own.items():
            helps.setdefault(name, set()).add(option.help)
            kinds.setdefault(name, set()).add(str(getattr(option, "bare_type", None) or option.type))
            for spelling in (*option.opts, *option.secondary_opts):
                letters.setdefault(spelling, set()).add(name)
    assert {name for name, texts in helps.items() if len(texts) > 1} <= OTHER_WORDS
    assert {name for name, kinds_of_option in kinds.items() if len(kinds_of_option) > 1} <= OTHER_KIND.keys()
    assert {spelling: names for spelling, names in letters.items() if len(names) > 1} == {}
    assert all(option.help for own in options.values() for option in own.values())
    assert "[default" not in "".join(text for texts in helps.values() for text in texts), "rich swallows it"


WRONG = [
    (("convert", "x", "-g", 2, "--preset", "bset"), "did you mean best?"),
    (("convert", "x", "-g", 2, "--method", "mena"), "did you mean mean?"),
    (("convert", "x", "-g", 2, "--verify", "logit"), "did you mean logits?"),
    (("convert", "x", "-g", 2, "--route", "nativ"), "did you mean native?"),
    (("convert", "x", "-g", 2, "--dtype", "fp61"), "did you mean fp16?"),
    (("convert", "x", "-g", 0), "--groups 0"),
    (("convert", "x", "-g", 2, "--refit"), "--refit: needs text"),
    (("convert", "x", "-g", 2, "--gruops", 2), "--groups"),
    (("convert", "x", "-g", "two"), "'--groups' / '-g'"),
    (("convert", "x"), "--groups"),
    (("sweep", "demo", "-g", 2, "--methods", "mean,bset"), "did you mean best?"),
    (("eval", "x"), "--data is missing"),
    (("eval", "x", "--data", "./nowhere.txt"), "does not exist"),
    (("bench", "x", "--cache-context", "many"), "--cache-context"),
    (("evla",), "eval"),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=lambda value: " ".join(map(str, value))[:40])
def test_what_is_wrong_is_told_in_one_line(arguments: tuple[object, ...], says: str, command: Command) -> None:
    finished = command("gqa", *arguments)
    assert finished.code == 2
    assert finished.out == ""
    assert len(finished.err.splitlines()) == 1
    assert finished.err.startswith("error: ")
    assert says in finished.err


def test_errors_for_machines(tmp_path: Path, command: Command) -> None:
    finished = command("gqa", "plan", tmp_path / "nowhere", "-g", 2, "--json")
    described = json.loads(finished.out)
    assert described.pop("schema_version") == 1
    message = f"{tmp_path / 'nowhere'}: no such folder."
    assert described == {"error": {"kind": "UsageError", "message": message, "exit_code": 2}}
    assert finished.err == f"error: {message}\n"
    assert json.loads(command("gqa", "plan", "--json").out)["error"]["exit_code"] == 2


def test_a_missing_folder_is_told_with_the_nearest(tmp_path: Path, command: Command) -> None:
    (tmp_path / "llama-gqa8").mkdir()
    finished = command("gqa", "inspect", tmp_path / "lama-gqa8")
    assert finished.code == 2
    assert f"did you mean {tmp_path / 'llama-gqa8'}?" in finished.err


def test_demo_is_a_model_wherever_one_is_named(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "made" / "for" / "it"
    assert command("gqa", "convert", "demo", "-g", 2, "-o", out, "--no-measure").code == 0
    assert command("gqa", "verify", "demo", out).code == 0
    assert json.loads(command("gqa", "inspect", "demo", "--json").out)["kv_heads"] == 8
    assert json.loads(command("gqa", "plan", "demo", "-g", 4, "--json").out)["target"] == str(tmp_path / "demo-gqa4")
    assert json.loads(command("gqa", "budget", "demo", "--tokens", "1M", "--json").out)["schema_version"] == 1


def test_quiet_and_verbose(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "model")
    assert command("gqa", "convert", source, "-g", 4, "-q", "--no-measure").err == ""
    assert talking().quiet
    assert "Traceback" in command("gqa", "inspect", tmp_path / "nowhere", "-v").err
    assert "Traceback" not in command("gqa", "inspect", tmp_path / "nowhere").err
    assert not talking().quiet


def test_a_token_reaches_the_hub(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import get_token

    monkeypatch.setenv("HF_TOKEN", "before")
    command("gqa", "inspect", tmp_path / "nowhere", "--token", "hf_mine")
    assert get_token() == "hf_mine"


def test_completion_offers_the_choices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from gqa_convert.cli import main

    monkeypatch.setenv("_GQA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "gqa convert demo --preset ")
    monkeypatch.setenv("COMP_CWORD", "4")
    monkeypatch.setattr(sys, "argv", ["gqa"])
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().out.split() == ["paper", "fast", "best", "heal"]
