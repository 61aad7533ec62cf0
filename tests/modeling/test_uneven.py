"""Models whose layers differ in KV heads: the contract over families (the rest: `pytest -m slow tests/modeling`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.modeling import uneven_contract


@pytest.mark.parametrize("model_type", uneven_contract.USUAL)
def test_the_contract_holds_for_layers_that_differ(model_type: str, tmp_path: Path) -> None:
    uneven_contract.check(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [each for each in uneven_contract.FAMILIES if each not in uneven_contract.USUAL])
def test_the_contract_holds_for_every_family(model_type: str, tmp_path: Path) -> None:
    uneven_contract.check(model_type, tmp_path)
