"""The engine checks: what they say in the docs and the package; with `-m clients` and GQA_CLIENTS=FOLDER, run anew.

FOLDER is what scripts/clients/setup.sh filled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gqa_convert.modeling.engines import summary, where_it_runs
from gqa_convert.modeling.transpile.rule import all_rules
from tests.support import script_module

SCRIPTS = Path(__file__).parents[2] / "scripts" / "clients"
RESULTS = json.loads((SCRIPTS / "results.json").read_text())
MODELS = ("Llama", "GPT-NeoX, sequential", "Phi")


def load(name: str) -> ModuleType:
    return script_module(SCRIPTS / f"{name}.py")


@pytest.mark.clients
@pytest.mark.parametrize("engine", RESULTS["engines"])
@pytest.mark.parametrize("model", MODELS)
def test_an_engine_does_what_the_results_say(engine: str, model: str, tmp_path: Path) -> None:
    if "GQA_CLIENTS" not in os.environ:
        pytest.skip("GQA_CLIENTS is not set; see scripts/clients/setup.sh")
    folders = load("models").write_models(tmp_path, model)
    answers = list(load("run").ask(engine, Path(os.environ["GQA_CLIENTS"]), [folder for _, folder in folders]))
    known = {r["label"]: r for r in RESULTS["engines"][engine]["answers"] if r["model"] == model}
    verdict = load("engine_tables").verdict
    control = folders[0][0]
    for (label, _), answer in list(zip(folders, answers, strict=True))[1:]:
        if label in known:
            assert verdict(engine, answer, answers[0]) == verdict(engine, known[label], known[control]), answer


def test_docs_and_package_say_what_the_results_say() -> None:
    tables = load("engine_tables")
    assert f"{tables.BEGIN}\n\n{tables.page_table(RESULTS)}\n\n{tables.END}" in tables.PAGE.read_text()
    assert json.loads(tables.SUMMARY.read_text()) == tables.summary(RESULTS)


def test_caches_in_the_engines_hold_the_share_of_heads_that_are_left() -> None:
    """llama.cpp's figure has 12 to 24 bytes per token of its own, whatever the heads."""
    shares = []
    for engine, seen in RESULTS["engines"].items():
        whole = {r["model"]: r for r in seen["answers"] if r["label"].startswith("MHA")}
        for answer in seen["answers"]:
            before = whole[answer["model"]].get("cache_bytes_per_token")
            if before and answer.get("cache_bytes_per_token") and answer["type"] == whole[answer["model"]]["type"]:
                own = answer["cache_bytes_per_token"] % 256
                left = (answer["cache_bytes_per_token"] - own) / (before - own)
                shares.append((engine, answer["model"], left, int(answer["label"].split()[1]) / 8))
    assert len({engine for engine, *_ in shares}) >= 3
    assert [each for each in shares if each[2] != each[3]] == []


def test_every_rule_was_run_in_the_engines() -> None:
    checked = summary()["families"]
    for rule in all_rules().values():
        assert any(f"{source}>{rule.target}" in checked for source in rule.sources), rule.name


def test_a_silent_error_comes_first_and_is_named() -> None:
    first = where_it_runs("opt", "gpt_bigcode")[0]
    assert first.startswith("WRONG, without a word, in llama.cpp (its StarCoder always has GELU")
    assert not any("WRONG" in line for line in where_it_runs("gpt2", "gpt_bigcode"))
    assert where_it_runs("gqa_gpt2", "gqa_gpt2") == where_it_runs("gpt2", "gqa_gpt2") != ()
    assert where_it_runs("unheard_of", "unheard_of") == ()


def test_verdicts() -> None:
    verdict = load("engine_tables").verdict
    good, off, error = {"difference": 1e-6}, {"difference": 1.0}, {"error": "no"}
    assert verdict("vllm", good, good) == "right"
    assert verdict("vllm", off, good) == verdict("vllm", off, error) == "wrong"
    assert verdict("vllm", off, {"difference": 0.5}) == "unlike_source"
    assert verdict("vllm", error, good) == "refused"
    assert verdict("llamacpp", {"difference": 2e-3}, good) == "right"
    assert verdict("vllm", {"difference": 2e-3}, good) == "wrong"
    assert verdict("llamacpp", error | {"mended": {"difference": 2e-3}}, good) == "mended"


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


def test_a_crash_costs_one_answer(tmp_path: Path) -> None:
    """A check whose engine dies on one folder still answers about the next."""
    np = pytest.importorskip("numpy")
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "reference.npz", ids=np.array([0, 1]), logits=np.eye(2))
    script = (
        "import os, sys\nimport numpy as np\nfrom common import main\n"
        "def values(folder, ids):\n"
        "    if folder.name == 'bad':\n        os.write(2, b'assertion failed'); os.abort()\n"
        "    return np.eye(2)\n"
        "main(values, lambda: 'engine 1')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "bad"), str(tmp_path / "good")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SCRIPTS)})
    first, second = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert first["error"].endswith("assertion failed")
    assert second["difference"] == 0.0
