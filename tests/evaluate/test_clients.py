"""The client checks as tests: `GQA_CLIENTS=FOLDER pytest -m clients`, FOLDER as scripts/clients/setup.sh fills it."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "clients"
CLIENTS = ("transformers", "ctranslate2", "onnx", "mlx", "lm_eval", "llamacpp")
TOLERANCE = {"llamacpp": 2e-2}  # nats; llama.cpp computes parts of attention in lower precision


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = load("models").write_models(tmp_path_factory.mktemp("clients"), "llama")
    return found


@pytest.mark.clients
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_computes_what_transformers_computes(client: str, folders: list[tuple[str, Path]]) -> None:
    if "GQA_CLIENTS" not in os.environ:
        pytest.skip("GQA_CLIENTS is not set; see scripts/clients/setup.sh")
    run = load("run")
    python = Path(os.environ["GQA_CLIENTS"]).absolute() / run.CLIENTS[client] / "bin" / "python"
    for label, folder in folders:
        answer = run.ask(client, python, folder)
        assert "error" not in answer, f"{label}: {answer}"
        assert answer["difference"] < TOLERANCE.get(client, 1e-4), f"{label}: {answer}"
        assert answer["same_first"], label


def test_the_table_shows_differences_and_faults() -> None:
    load("models")
    results = [
        {"client": "mlx", "variant": "llama", "label": "MHA 8", "difference": 1.5e-6, "version": "mlx-lm 1"},
        {"client": "mlx", "variant": "llama", "label": "GQA 2", "error": "KeyError: 'type'", "version": "mlx-lm 1"},
    ]
    lines = load("run").table(results).splitlines()
    assert lines[0] == "| client | model | MHA 8 | GQA 2 |"
    assert lines[2] == "| mlx-lm 1 | llama | 1.5e-06 | fails [1] |"
    assert lines[4] == "[1] KeyError: 'type'"


def test_answers_are_compared_where_they_are_known() -> None:
    np = pytest.importorskip("numpy")
    common = load("common")
    expected = common.log_softmax(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    seen = expected.copy()
    seen[1, 0] += 0.25
    assert common.compare(seen, expected) == {"difference": 0.25, "same_first": True}
    seen[1] = np.nan
    assert common.compare(seen, expected) == {"difference": 0.0, "same_first": True}
    with pytest.raises(ValueError, match="no finite value"):
        common.compare(np.full((2, 3), np.nan), expected)
