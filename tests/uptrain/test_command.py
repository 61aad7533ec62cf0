"""`gqa uptrain` as it is typed: plans of every shipped configuration, and the embedded one run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gqa_convert.cli.main import app

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_prints_its_whole_plan_and_trains_nothing(
    path: Path, tiny_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    changes = [f"model={tiny_folder}", f"output={output}"]
    for section in ("objective.distillation.teacher", "evaluation.reference"):
        if section.rpartition(".")[2] in path.read_text():
            changes.append(f"{section}={teacher_folder}")
    arguments = ["uptrain", str(path), "--dry-run", *(word for change in changes for word in ("--set", change))]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    for row in ("horizon", "batch", "documents", "held out", "objective", "learning rate", "checkpoints", "trackers"):
        assert row in text
    printed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert printed["budget"]["steps"] > 0
    assert printed["config"]["train"]["micro_batch"] > 0
    assert not output.exists()


@pytest.mark.slow
def test_the_embedded_configuration_runs_as_its_comment_says(tmp_path: Path) -> None:
    comments = [line[4:] for line in (ROOT / "configs" / "embedded.yaml").read_text().splitlines()]
    (convert,) = [line for line in comments if line.startswith("gqa convert")]
    (train,) = [line for line in comments if line.startswith("gqa uptrain")]
    train = train.replace("configs/", f"{ROOT}/configs/") + " --profile --json --set budget.steps=6"
    shell = f'''
        python() {{ "{sys.executable}" "$@"; }}
        gqa() {{ python -c "from gqa_convert.cli.main import main; main()" "$@"; }}
        {convert} >&2 && {train} --set evaluation.tokens=1k
    '''
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6
    assert (tmp_path / "runs" / "embedded-gqa2" / "profile" / "trace-0.json").is_file()
