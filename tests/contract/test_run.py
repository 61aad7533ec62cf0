"""The run over all families outlives the families."""

from __future__ import annotations

import json
import os
import time
from importlib.resources import files
from pathlib import Path

import pytest

from gqa_convert.contract import run
from gqa_convert.contract.records import Record
from gqa_convert.hf import api


def test_a_crash_and_a_hang_cost_only_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(name: str, folder: Path) -> Record:
        if name == "crashes":
            os._exit(3)
        if name == "hangs":
            time.sleep(60)
        return Record(name, proven=True)

    monkeypatch.setattr(run, "prove", pretend)
    records = {r.model_type: r for r in run.run_all(["fine", "crashes", "hangs", "too"], jobs=2, timeout=2.0)}
    assert records["fine"].proven
    assert records["too"].proven
    assert "exit code 3" in records["crashes"].reason
    assert records["hangs"].reason == "took longer than 2 s"


def test_the_document_says_what_it_holds_for() -> None:
    records = [Record("b", proven=True), Record("a", refused=True, reason="no heads"), Record("c", reason="broken")]
    document = run.document(records)
    assert document["counts"] == {"model_types": 3, "proven": 1, "refused": 1}
    assert [entry["model_type"] for entry in document["families"]] == ["a", "b", "c"]
    assert document["versions"]["transformers"]
    json.dumps(document)


def test_the_recorded_run_proves_nearly_all_families() -> None:
    shipped = json.loads(files("gqa_convert.contract").joinpath("record.json").read_text())
    assert shipped["counts"]["proven"] == len(shipped["proven"]) >= 251
    assert all(shipped["unproven"].values())


def test_the_package_ships_what_the_whole_record_says() -> None:
    whole = json.loads((Path(__file__).parents[2] / "scripts" / "contract" / "record.json").read_text())
    shipped = json.loads(files("gqa_convert.contract").joinpath("record.json").read_text())
    assert shipped == run.summarised(whole)
    assert whole["counts"]["proven"] == sum(entry["proven"] for entry in whole["families"])


def test_the_record_knows_every_type_of_the_release_that_it_was_made_with() -> None:
    shipped = json.loads(files("gqa_convert.contract").joinpath("record.json").read_text())
    if shipped["versions"]["transformers"] == api.version():
        assert {*shipped["proven"], *shipped["unproven"]} == set(api.survey())
