"""Models named by hub id, against a small hub on this machine.

huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported, so each setting gets a process of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError, UsageError

from .helpers import sharded, single, write_config, write_index
from .hub_server import COMMIT, serve

DRIVER = """
import json, sys
from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.errors import GQAConvertError
answers = {}
for asked in sys.argv[1:]:
    model, _, revision = asked.partition("@")
    try:
        answers[asked] = ["ok", str(resolve_model(model, revision=revision or None))]
    except GQAConvertError as error:
        answers[asked] = [type(error).__name__, str(error)]
print(json.dumps(answers))
"""


def resolve(home: Path, *models: str, **environment: str) -> dict[str, Any]:
    """Resolve models in a fresh process; what each gave: `["ok", folder]` or `[error class, message]`."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *models],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    assert all("\n" not in message for _, message in answers.values())
    return answers


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One hub, asked for everything once; then the same questions with the hub gone, and offline."""
    root = tmp_path_factory.mktemp("hub")
    plain = content(single(root / "plain")) | {"tokenizer.json": b"{}", "README.md": b"hello"}
    explicit = content(single(root / "explicit", name="mine.safetensors"))
    write_config(root / "explicit", transformers_weights="mine.safetensors")
    explicit["config.json"] = (root / "explicit" / "config.json").read_bytes()
    write_index(root, {"a": "p-1.bin", "b": "p-2.bin", "c": "../p-3.bin"}, "pytorch_model.bin.index.json")
    others = {
        "model.fp16.safetensors": b"x",
        "pytorch_model.bin": b"x",
        "model-q4.gguf": b"x",
        "onnx/model.onnx": b"x",
        "original/consolidated.00.pth": b"x",
        "tf_model.h5": b"x",
        "chat_templates/tool_use.jinja": b"x",
    }
    repos = {
        "org/plain": plain,
        "org/many": content(sharded(root / "many")) | others,
        "org/explicit": explicit | others,
        "org/pickled": {
            "config.json": b"{}",
            "pytorch_model.bin.index.json": (root / "pytorch_model.bin.index.json").read_bytes(),
            "p-1.bin": b"1",
            "p-2.bin": b"2",
            "p-4.bin": b"4",
        },
        "org/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"},
        "org/gguf": {"config.json": b"{}", "model-q4.gguf": b"x"},
        "org/noconfig": {"model.safetensors": b"x"},
    }
    asked = [*repos, f"org/plain@{COMMIT}", "org/plain@v9", "org/none", "org/gated", "org/broken", "not an id"]
    with serve(repos) as (url, fetched):
        online = resolve(root / "home", *asked, HF_ENDPOINT=url)
    again = ["org/plain", "org/plain@v9", "org/none"]
    return {
        "online": online,
        "fetched": fetched,
        "refused": resolve(root / "home", *again, HF_ENDPOINT=url),
        "offline": resolve(root / "home", *again, HF_ENDPOINT=url, HF_HUB_OFFLINE="1"),
    }


def fetched(hub: dict[str, Any], repo: str) -> list[str]:
    return sorted(name.removeprefix(repo + "/") for name in hub["fetched"] if name.startswith(repo + "/"))


def folder(hub: dict[str, Any], model: str, when: str = "online") -> Path:
    kind, path = hub[when][model]
    assert kind == "ok", path
    return Path(path)


def test_a_model_comes_down_whole_and_opens(hub: dict[str, Any]) -> None:
    checkpoint = Checkpoint.open(folder(hub, "org/plain"))
    assert {str(path) for path in checkpoint.side_files} == {"README.md", "tokenizer.json"}
    assert checkpoint.tensor("embed.weight").shape == (11, 8)
    assert fetched(hub, "org/plain") == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_only_the_weights_transformers_would_load_are_fetched(hub: dict[str, Any]) -> None:
    assert len(Checkpoint.open(folder(hub, "org/many")).shards) == 2
    assert fetched(hub, "org/many") == [
        "chat_templates/tool_use.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert Checkpoint.open(folder(hub, "org/explicit")).weight_files[0].name == "mine.safetensors"
    assert fetched(hub, "org/explicit") == ["chat_templates/tool_use.jinja", "config.json", "mine.safetensors"]


def test_pickled_weights_are_fetched_where_there_is_nothing_better(hub: dict[str, Any]) -> None:
    assert fetched(hub, "org/pickled") == ["config.json", "p-1.bin", "p-2.bin", "pytorch_model.bin.index.json"]
    with pytest.raises(CheckpointError, match=r"\.\./p-3\.bin"):
        Checkpoint.open(folder(hub, "org/pickled"))


def test_a_commit_names_the_same_snapshot(hub: dict[str, Any]) -> None:
    assert folder(hub, f"org/plain@{COMMIT}") == folder(hub, "org/plain")


def test_of_an_adapter_only_the_description_is_fetched(hub: dict[str, Any]) -> None:
    assert folder(hub, "org/adapter").name == COMMIT
    assert fetched(hub, "org/adapter") == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("asked", "kind", "says"),
    [
        ("org/plain@v9", "HubError", "not revision 'v9'"),
        ("org/none", "HubError", "no such model"),
        ("org/gated", "HubError", "gated"),
        ("org/broken", "HubError", "HTTP status 500"),
        ("not an id", "HubError", "neither a folder that exists nor a hub id"),
        ("org/gguf", "CheckpointError", "neither safetensors nor .bin"),
        ("org/noconfig", "CheckpointError", "no config.json"),
    ],
)
def test_every_refusal_is_one_clear_line(hub: dict[str, Any], asked: str, kind: str, says: str) -> None:
    assert hub["online"][asked][0] == kind
    assert says in hub["online"][asked][1]
    assert asked.partition("@")[0] in hub["online"][asked][1]


@pytest.mark.parametrize(("when", "says"), [("refused", "cannot be reached"), ("offline", "HF_HUB_OFFLINE is set")])
def test_without_the_hub_a_warm_cache_serves_and_a_cold_one_says_why(hub: dict[str, Any], when: str, says: str) -> None:
    assert folder(hub, "org/plain", when) == folder(hub, "org/plain")
    for asked in ("org/none", "org/plain@v9"):
        assert hub[when][asked][0] == "HubError"
        assert says in hub[when][asked][1]


def test_a_hub_that_never_answers_times_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        answer = resolve(tmp_path, "org/plain", HF_ENDPOINT=url, HF_HUB_ETAG_TIMEOUT="1")["org/plain"]
    assert answer[0] == "HubError"
    assert "cannot be reached" in answer[1]


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("org/name") == Path("org/name")
    assert resolve_model("~/org/name") == tmp_path / "org" / "name"


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--revision v1"):
        resolve_model(str(tmp_path), revision="v1")


@pytest.mark.parametrize(
    "model",
    ["./gone", "../gone", "/gone", "~/gone", "a/b/c", "org/name/", "", "~", "/" + "x" * 300, "~noone-of-that-name/x"],
)
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    with pytest.raises(UsageError, match="no such folder"):
        resolve_model(model)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(tmp_path / "model.gguf"))
