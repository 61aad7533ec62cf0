"""Fixtures that every room's tests may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support import Command, Finished

settings.register_profile("busy", deadline=None)  # how long an example takes says nothing on a machine that is shared
settings.load_profile("busy")
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and tests may run side by side


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `gqa-convert` or `gqa` in this process: `command("gqa-convert", source, "--groups", 4)`."""
    from gqa_convert.cli import main

    def run(program: str, *arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            {"gqa-convert": main.convert_main, "gqa": main.main}[program]()
        printed = capsys.readouterr()
        code = exited.value.code
        return Finished(code if isinstance(code, int) else 0 if code is None else 1, printed.out, printed.err)

    return run


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, whatever the environment says."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts that larger measurements use; skips where there is none."""
    folder = Path(os.environ.get("GQA_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("no shared/ folder of real models (set GQA_SHARED)")
    return folder
