import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.errors import UsageError
from gqa_convert.evaluate import models
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.tasks import run_tasks
from tests.evaluate.tiny import LINES

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{rest}
"""


def write_task(folder: Path, name: str, data: Path, kind: str, text: str, target: str, rest: str = "") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=data, kind=kind, text=text, target=target, rest=rest))
    return path


def test_without_lm_eval_it_says_what_to_install(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"gqa-convert\[eval\]"):
        run_tasks(["boolq"], [models.subject(str(llama))])


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("_offline")
def test_agrees_with_lm_evals_own_loglikelihood(llama: Path, llama_gqa2: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    text = LINES[0][:60]
    data = tmp_path / "one.txt"
    data.write_text(text)
    for folder in (llama, llama_gqa2):
        evaluation = evaluate(folder, [], EvalSettings(data=str(data), eos=False))
        subject = models.subject(str(folder))
        # lm-eval puts BOS first itself; left to the tokenizer as well, there would be two, and one of them scored.
        theirs = HFLM(pretrained=models.load(subject), tokenizer=subject.source.tokenizer(), add_bos_token=False)
        request = Instance("loglikelihood_rolling", {}, (text,), 0)
        (loglikelihood,) = theirs.loglikelihood_rolling([request], disable_tqdm=True)
        assert evaluation.tokens == len(text.encode())
        assert evaluation.base.loss == pytest.approx(-loglikelihood / evaluation.tokens, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_offline")
def test_command_line(llama: Path, llama_gqa2: Path, lines: Path, tmp_path: Path) -> None:
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps({"q": line[:20], "a": n % 2}) + "\n" for n, line in enumerate(LINES)))
    rest = 'doc_to_choice: ["yes", "no"]\nmetric_list:\n  - metric: acc'
    task = write_task(tmp_path, "choices", data, "multiple_choice", "{{q}}", "{{a}}", rest)
    args = ["eval", str(llama), str(llama_gqa2), "--data", str(lines), "--max-windows", "2"]
    finished = CliRunner().invoke(app, [*args, "--tasks", str(task), "--tasks-limit", "10", "--json"])
    assert finished.exit_code == 0, finished.output
    tasks = json.loads(finished.stdout[finished.stdout.index("{\n") :])["tasks"]
    assert set(tasks) == {"tiny-llama", "tiny-llama-gqa2"}
    assert 0 <= tasks["tiny-llama"]["choices"]["acc"] <= 1
    for wrong in ("no_such_task", str(tmp_path / "none.yaml")):
        refused = CliRunner().invoke(app, [*args, "--tasks", wrong])
        assert isinstance(refused.exception, UsageError)
