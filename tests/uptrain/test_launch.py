"""The launchers, with a stand-in for what only a cluster has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"

FAKE_PYTHON = """#!/usr/bin/env bash
FSDP=${FSDP_VERSION:-none}
ZERO=${ACCELERATE_DEEPSPEED_ZERO_STAGE:-none}
echo "rank=$RANK local=$LOCAL_RANK world=$WORLD_SIZE fsdp=$FSDP zero=$ZERO port=${MASTER_PORT:+set} args=$*"
exit "${FAKE_CODE:-0}"
"""
FAKE_SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do shift; done
highest=0
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@"
  code=$?; [ "$code" -gt "$highest" ] && highest=$code
done
exit "$highest"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && echo node1 && exit
echo "requeued $2" >> "$REQUEUED"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    for name, text in (("python-fake", FAKE_PYTHON), ("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python-fake"),
        "REQUEUED": str(tmp_path / "requeued"), "SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node1", "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip


def run(script: str, *arguments: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", LAUNCH / script, *arguments], env=env, capture_output=True, text=True)


def test_slurm_starts_a_process_a_task_and_requeues_after_75(cluster: dict[str, str], tmp_path: Path) -> None:
    done = run("slurm.sbatch", "c.yaml", "--set", "a.b=c d", env=cluster)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["rank=0", "rank=1"]
    assert all("fsdp=2" in line and "port=set" in line and "world=2" in line for line in lines)
    assert all("c.yaml --set a.b=c d --set expect.engine=fsdp2 --set expect.processes=2" in line for line in lines)
    assert not (tmp_path / "requeued").exists()
    assert run("slurm.sbatch", "c.yaml", env={**cluster, "FAKE_CODE": "75"}).returncode == 75
    assert (tmp_path / "requeued").read_text() == "requeued 77\n"
    assert run("slurm.sbatch", "c.yaml", env={**cluster, "FAKE_CODE": "8"}).returncode == 8
    assert (tmp_path / "requeued").read_text() == "requeued 77\n"


def test_many_gpus_says_what_it_expects_and_passes_codes_on(cluster: dict[str, str]) -> None:
    done = run("many_gpus.sh", "c.yaml", env={**cluster, "PROCESSES": "3"})
    assert done.returncode == 0
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == ["rank=0", "rank=1", "rank=2"]
    assert "--set expect.engine=ddp --set expect.processes=3" in done.stdout
    done = run("many_gpus.sh", "c.yaml", env={**cluster, "PROCESSES": "2", "ENGINE": "deepspeed"})
    assert done.stdout.count("zero=3") == done.stdout.count("--set expect.engine=deepspeed") == 2
    assert run("many_gpus.sh", "c.yaml", env={**cluster, "PROCESSES": "2", "FAKE_CODE": "75"}).returncode == 75
    assert run("many_gpus.sh", "c.yaml", env={**cluster, "PROCESSES": "2", "ENGINE": "magic"}).returncode == 2
    assert run("many_gpus.sh", env=cluster).returncode == 2


def test_one_gpu_expects_one_process(cluster: dict[str, str]) -> None:
    done = run("one_gpu.sh", "c.yaml", env={**cluster, "FAKE_CODE": "75"})
    assert done.returncode == 75
    assert "expect.engine=single --set expect.processes=1" in done.stdout


def test_the_sky_task_runs_what_is_there() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert "scripts/launch/many_gpus.sh" in task["run"]
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    assert task["resources"]["use_spot"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if path.stem == "deepspeed":
        assert config.deepspeed_config["zero_stage"] == 3
        assert not config.deepspeed_config["zero3_init_flag"]


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "gqa_convert.uptrain", "--help"], capture_output=True, text=True)
    assert "--dry-run" in done.stdout
