"""Bad input through the command line: one clear line, the right exit code, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gqa_convert import convert
from tests import factories
from tests.support import Command, Finished, tree

USAGE, VERIFICATION, CHECKPOINT, UNSUPPORTED, OUTPUT, HUB = 2, 3, 4, 5, 6, 7
K = "model.layers.0.self_attn.k_proj.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def assert_refused(finished: Finished, code: int, *words: str) -> None:
    assert finished.code == code, finished.err
    assert finished.out == ""
    lines = finished.err.splitlines()
    assert len(lines) == 1, finished.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in finished.err
    for word in words:
        assert word in lines[0]


def config_of(**values: object) -> Callable[[Path], None]:
    return write("config.json", json.dumps(values).encode())


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / name).write_bytes(data)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


def truncate(source: Path) -> None:
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(data[: len(data) // 2])


def append(source: Path) -> None:
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes() + b"more")


def lie_about_length(length: int) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        data = (source / WEIGHTS).read_bytes()
        (source / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])

    return change


def lie_about_shape(source: Path) -> None:
    lie(source, [64, 128])


def lie(source: Path, shape: list[int]) -> None:
    data = (source / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[K]["shape"] = shape
    text = json.dumps(header).encode()
    (source / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def change(edit: Callable[[factories.Tensors], object]) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        factories.change_tensors(source, edit)

    return apply


def set_value(key: str, value: float) -> Callable[[Path], None]:
    def edit(tensors: factories.Tensors) -> None:
        tensors[key].flatten()[5] = value

    return change(edit)


def index_of(name: str) -> Callable[[Path], None]:
    """Make the checkpoint a sharded one whose index says that one tensor lies in `name`."""

    def make(source: Path) -> None:
        (source / WEIGHTS).rename(source / "model-00001-of-00001.safetensors")
        keys = factories.tensors_of(source)
        weight_map = dict.fromkeys(keys, "model-00001-of-00001.safetensors")
        (source / INDEX).write_text(json.dumps({"weight_map": {**weight_map, K: name}}))

    return make


def escaping_link(source: Path) -> None:
    elsewhere = source.parent / "elsewhere.safetensors"
    (source / WEIGHTS).rename(elsewhere)
    (source / "linked.safetensors").symlink_to(elsewhere)
    weight_map = dict.fromkeys(factories.tensors_of(source), "linked.safetensors")
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch exploded",)


def pickle_bomb(source: Path) -> None:
    (source / WEIGHTS).unlink()
    torch.save({"x": Bomb()}, source / "pytorch_model.bin")


def plain_pickle_bomb(source: Path) -> None:
    (source / WEIGHTS).unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb()}))


def quantise(suffix: str, method: str) -> Callable[[Path], None]:
    """Replace the projections of attention by the packed tensors of a quantisation."""

    def make(source: Path) -> None:
        def pack(tensors: factories.Tensors) -> None:
            for key in [key for key in tensors if "_proj.weight" in key]:
                del tensors[key]
                tensors[key.removesuffix("weight") + suffix] = torch.zeros(8, 64, dtype=torch.int32)

        change(pack)(source)
        factories.change_config(source, quantization_config={"quant_method": method, "bits": 4})

    return make


def pipe(name: str) -> Callable[[Path], None]:
    def make(source: Path) -> None:
        (source / name).unlink(missing_ok=True)
        os.mkfifo(source / name)

    return make


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(source: Path) -> None:
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(target)

    return make


def views_without_end(source: Path) -> None:
    """92 KB that would become a gigabyte."""
    tensors = factories.tensors_of(source)
    (source / WEIGHTS).unlink()
    torch.save({**tensors, "extra.weight": torch.zeros(1).expand(1 << 28)}, source / "pytorch_model.bin")


def bitsandbytes(source: Path) -> None:
    def pack(tensors: factories.Tensors) -> None:
        for key in [key for key in tensors if "_proj.weight" in key]:
            tensors[key] = torch.zeros(2048, 1, dtype=torch.uint8)
            tensors[f"{key}.absmax"] = torch.zeros(64)

    change(pack)(source)
    factories.change_config(source, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "no config": (remove("config.json"), CHECKPOINT, ("config.json",)),
    "config is no JSON": (write("config.json", b"{nope"), CHECKPOINT, ("config.json", "JSON")),
    "config is a list": (write("config.json", b"[]"), CHECKPOINT, ("config.json", "list")),
    "config is no text": (write("config.json", b"\xff\xfe\x00"), CHECKPOINT, ("config.json",)),
    "config is empty": (write("config.json", b"{}"), UNSUPPORTED, ("config.json",)),
    "unknown model type": (config_of(model_type="nosuchmodel"), UNSUPPORTED, ("config.json", "model type")),
    "config of nonsense": (
        config_of(model_type="llama", hidden_size="wide", num_attention_heads=8),
        CHECKPOINT,
        ("config.json", "hidden_size"),
    ),
    "no weights": (remove(WEIGHTS), CHECKPOINT, ("no weights",)),
    "empty weights": (write(WEIGHTS, b""), CHECKPOINT, (WEIGHTS,)),
    "lfs pointer": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), CHECKPOINT, ("git lfs pull",)),
    "truncated shard": (truncate, CHECKPOINT, (WEIGHTS, "truncated")),
    "bytes too many": (append, CHECKPOINT, (WEIGHTS, "4 bytes")),
    "header longer than the file": (lie_about_length(10**7), CHECKPOINT, (WEIGHTS, "truncated")),
    "header beyond reason": (lie_about_length(2**62), CHECKPOINT, (WEIGHTS,)),
    "header too short": (lie_about_length(100), CHECKPOINT, (WEIGHTS, "JSON")),
    "shape that does not fit its bytes": (lie_about_shape, CHECKPOINT, (WEIGHTS, K)),
    "index names a missing file": (index_of("gone.safetensors"), CHECKPOINT, (INDEX, "gone.safetensors")),
    "index leads up": (index_of("../model.safetensors"), CHECKPOINT, (INDEX, "../model.safetensors")),
    "index leads away": (index_of("/etc/passwd"), CHECKPOINT, (INDEX, "/etc/passwd")),
    "index follows a link out": (escaping_link, CHECKPOINT, (INDEX, "linked.safetensors", "link")),
    "index is no JSON": (lambda s: (remove(WEIGHTS)(s), write(INDEX, b"{")(s)), CHECKPOINT, (INDEX,)),
    "NaN in a key projection": (set_value(K, float("nan")), CHECKPOINT, (WEIGHTS, K, "not finite")),
    "infinity in a value projection": (
        set_value("model.layers.1.self_attn.v_proj.weight", float("-inf")),
        CHECKPOINT,
        ("model.layers.1.self_attn.v_proj.weight", "1 value"),
    ),
    "a projection is missing": (change(lambda tensors: tensors.pop(K)), CHECKPOINT, (K,)),
    "head counts that do not fit": (
        lambda s: factories.change_config(s, num_attention_heads=16, num_key_value_heads=16, head_dim=8),
        CHECKPOINT,
        (K, "shape"),
    ),
    "adapter": (write("adapter_config.json", b"{}"), UNSUPPORTED, ("adapter", "merge_and_unload")),
    "GPTQ": (quantise("qweight", "gptq"), UNSUPPORTED, ("quantised",)),
    "AWQ": (quantise("qweight", "awq"), UNSUPPORTED, ("quantised",)),
    "compressed tensors": (quantise("weight_packed", "compressed-tensors"), UNSUPPORTED, ("quantised",)),
    "bitsandbytes": (bitsandbytes, UNSUPPORTED, ("quantised",)),
    "8 bit floats": (
        change(lambda tensors: tensors.update({K: tensors[K].to(torch.float8_e4m3fn)})),
        UNSUPPORTED,
        (K, "F8_E4M3"),
    ),
    "pickle that runs code": (pickle_bomb, CHECKPOINT, ("pytorch_model.bin", "run code")),
    "old pickle that runs code": (plain_pickle_bomb, CHECKPOINT, ("pytorch_model.bin",)),
    "gguf alone": (lambda s: (s / WEIGHTS).rename(s / "model.gguf"), CHECKPOINT, ("no weights", "model.gguf")),
    "code of its own": (
        lambda s: factories.change_config(s, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"}),
        UNSUPPORTED,
        ("--trust-remote-code",),
    ),
    "no KV-head setting": (
        config_of(model_type="led", architectures=["LEDForConditionalGeneration"]),
        UNSUPPORTED,
        ("led",),
    ),
    "latent attention": (
        config_of(model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"]),
        UNSUPPORTED,
        ("deepseek_v3", "latent"),
    ),
    "no KV heads": (lambda s: factories.change_config(s, num_key_value_heads=0), CHECKPOINT, ("num_key_value_heads",)),
    "layers without end": (
        lambda s: factories.change_config(s, num_hidden_layers=2**63),
        CHECKPOINT,
        ("num_hidden_layers", "tensors"),
    ),
    "more layers than tensors": (
        lambda s: factories.change_config(s, num_hidden_layers=300),
        CHECKPOINT,
        ("model.layers.10.self_attn.k_proj.weight",),
    ),
    "heads without end": (lambda s: factories.change_config(s, num_attention_heads=2**62), CHECKPOINT, ("heads",)),
    "config is a pipe": (pipe("config.json"), CHECKPOINT, ("config.json", "pipe")),
    "record is a pipe": (pipe("gqa_convert.json"), CHECKPOINT, ("gqa_convert.json", "pipe")),
    "weights are a pipe": (pipe(WEIGHTS), CHECKPOINT, (WEIGHTS, "no regular file")),
    "config is a device": (link("config.json", "/dev/zero"), CHECKPOINT, ("config.json", "device")),
    "record is a device": (link("gqa_convert.json", "/dev/zero"), CHECKPOINT, ("gqa_convert.json", "link")),
    "weights are a device": (link(WEIGHTS, "/dev/zero"), CHECKPOINT, (WEIGHTS, "no regular file")),
    "record leads away": (link("gqa_convert.json", "/etc/hostname"), CHECKPOINT, ("gqa_convert.json", "link")),
    "record is a list": (write("gqa_convert.json", b"[]"), CHECKPOINT, ("gqa_convert.json", "list")),
    "record of lists": (write("gqa_convert.json", b'{"tool": []}'), CHECKPOINT, ("gqa_convert.json", "'tool'")),
    "views without end": (views_without_end, CHECKPOINT, ("pytorch_model.bin", "extra.weight")),
    "a shape that no number tells": (
        lambda s: lie(s, [2**62] * 60),
        CHECKPOINT,
        (WEIGHTS, K, "more elements"),
    ),
    "compiled": (
        change(lambda t: [t.update({f"_orig_mod.{k}": t.pop(k)}) for k in list(t)]),
        CHECKPOINT,
        ("_orig_mod",),
    ),
    "a wrapper's names": (
        change(lambda t: [t.update({f"net.{k}": t.pop(k)}) for k in list(t)]),
        CHECKPOINT,
        ("'net.'", "wrapper"),
    ),
    "architectures name a function": (
        lambda s: factories.change_config(s, model_type="mamba", architectures=["pipeline"]),
        UNSUPPORTED,
        ("mamba",),
    ),
    "no attention": (config_of(model_type="mamba", architectures=["MambaForCausalLM"]), UNSUPPORTED, ("mamba",)),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source(name: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, code, words = BAD_SOURCES[name]
    monkeypatch.chdir(tmp_path)
    source = factories.make(tmp_path / "source")
    spoil(source)
    before = tree(tmp_path)
    assert_refused(command("gqa-convert", source, "--groups", 4, "--out", tmp_path / "out"), code, *words)
    assert tree(tmp_path) == before
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("method", ["pca", "aligned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_cannot_be_solved(method: str, value: float, tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    set_value(K, value)(source)
    before = tree(tmp_path)
    options = ["--groups", 4, "--method", method, "--out", tmp_path / "out"]
    assert_refused(command("gqa-convert", source, *options), CHECKPOINT, K, "1 of", "not finite")
    assert {name: held for name, held in tree(tmp_path).items() if "work" not in str(name)} == before


@pytest.mark.parametrize(
    "source",
    ["./nowhere", "/nowhere/at/all", "../x", "a/b/c"],
)
def test_missing_folder(source: str, tmp_path: Path, command: Command) -> None:
    assert_refused(command("gqa-convert", source, "--groups", 4, "--out", tmp_path / "out"), USAGE, source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("typed", "meant"), [("modles/llama", "models/llama"), ("models/lama", "models/llama"), ("sorce", "source")]
)
def test_a_mistyped_path_is_no_hub_id(
    typed: str, meant: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "source").mkdir()
    assert_refused(
        command("gqa-convert", typed, "--groups", 4), USAGE, f"{typed}: no such folder", f"did you mean {meant}?"
    )


@pytest.mark.usefixtures("offline")
def test_a_name_below_a_folder_that_is_here(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert_refused(command("gqa-convert", "org/other", "--groups", 4), USAGE, "no such folder in org/")


@pytest.mark.usefixtures("offline")
def test_unknown_name_without_a_network(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(command("gqa-convert", "org/nosuchmodel", "--groups", 4), HUB, "org/nosuchmodel", "HF_HUB_OFFLINE")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_a_folder(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    assert_refused(command("gqa-convert", source / WEIGHTS, "--groups", 4), CHECKPOINT, "folder")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--groups", 3), USAGE, ("--groups 3", "8", "1, 2, 4, 8")),
        (("--groups", 16), USAGE, ("--groups 16", "1, 2, 4, 8")),
        (("--groups", 0), USAGE, ("--groups 0",)),
        (("--groups", 4, "--method", "maen"), USAGE, ("maen", "mean")),
        (("--groups", 4, "--verify", "all"), USAGE, ("all", "structure")),
    ],
)
def test_bad_choice(
    arguments: tuple[object, ...], code: int, words: tuple[str, ...], tmp_path: Path, command: Command
) -> None:
    source = factories.make(tmp_path / "source")
    before = tree(tmp_path)
    assert_refused(command("gqa-convert", source, *arguments), code, *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("family", "groups"), [("falcon", 4), ("gpt_bigcode", 2)])
def test_families_that_know_one_head_or_all(family: str, groups: int, tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source", family)
    assert_refused(command("gqa-convert", source, "--groups", groups), UNSUPPORTED, f"--groups {groups}", "--groups 1")


def test_grouped_source_to_more_heads(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source", kv_heads=2)
    assert_refused(command("gqa-convert", source, "--groups", 4), USAGE, "--groups 4", "1, 2")


def test_existing_output(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    assert command("gqa-convert", source, "--groups", 4).code == 0
    before = tree(tmp_path)
    assert_refused(command("gqa-convert", source, "--groups", 4), OUTPUT, "source-gqa4", "--force")
    assert tree(tmp_path) == before


def thesis(out: Path) -> None:
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")


def thesis_with_a_config(out: Path) -> None:
    thesis(out)
    (out / "config.json").write_text('{"font": "Times"}')


def original_model(out: Path) -> None:
    factories.make(out, seed=1)
    (out / "optimizer.pt").write_bytes(b"weeks of training")


def output_with_notes(out: Path) -> None:
    convert(factories.make(out.with_name("other")), groups=2, out=out)
    (out / "notes.txt").write_text("what I saw")


def output_trained_further(out: Path) -> None:
    convert(factories.make(out.with_name("other")), groups=2, out=out)
    (out / "training_args.bin").write_bytes(b"x")


def record_of_something_else(out: Path) -> None:
    thesis_with_a_config(out)
    (out / "gqa_convert.json").write_text('{"tool": {"name": "gqa-convert"}, "conversion": {}, "files": {}}')


@pytest.mark.parametrize(
    "make",
    [
        thesis,
        thesis_with_a_config,
        original_model,
        output_with_notes,
        output_trained_further,
        record_of_something_else,
    ],
)
def test_force_replaces_nothing_but_what_we_wrote(
    make: Callable[[Path], None], tmp_path: Path, command: Command
) -> None:
    source, out = factories.make(tmp_path / "source"), tmp_path / "thesis"
    make(out)
    before = tree(tmp_path)
    assert_refused(
        command("gqa-convert", source, "--groups", 4, "--out", out, "--force"), OUTPUT, "thesis", "never replaced"
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["home", "working directory"])
def test_force_replaces_no_place_that_people_are_in(
    place: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = factories.make(tmp_path / "source")
    out = convert(source, groups=2, out=tmp_path / "out").out
    if place == "home":
        monkeypatch.setenv("HOME", str(out))
    else:
        monkeypatch.chdir(out)
    before = tree(out)
    assert_refused(command("gqa-convert", source, "--groups", 4, "--out", out, "--force"), OUTPUT, place)
    assert tree(out) == before


@pytest.mark.parametrize("work", ["source", "source/work", "source/deep/work", "link/work"])
def test_work_in_the_source_is_refused_before_anything_is_solved(work: str, tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = tree(tmp_path)
    chosen = ("--groups", 4, "--method", "pca", "--work", tmp_path / work)
    assert_refused(command("gqa-convert", source, *chosen), OUTPUT, "source", "--work")
    assert tree(tmp_path) == before
    assert not (source / "work").exists()


def test_work_in_the_output_is_refused(tmp_path: Path, command: Command) -> None:
    source, out = factories.make(tmp_path / "source"), tmp_path / "out"
    chosen = ("--groups", 4, "--method", "pca", "--out", out, "--work", out / "work")
    assert_refused(command("gqa-convert", source, *chosen), OUTPUT, "--work")
    assert not out.exists()


def test_a_work_folder_of_that_name_that_is_somebody_elses_is_not_removed(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    work = tmp_path / ".out.work"
    (work / "layers-notes").mkdir(parents=True)
    (work / "plans.txt").write_text("x")
    convert(source, groups=4, out=tmp_path / "out", method="pca")
    assert sorted(path.name for path in work.iterdir()) == ["layers-notes", "plans.txt"]


@pytest.mark.parametrize("name", ["o[red]ut", "[bold]", "o:smile:ut", "o\\[x]ut", "ö ü", "ou\nt", "x" * 240])
def test_any_name_is_shown_and_made_as_it_is(name: str, tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    for extra in ((), ("--force",)):
        finished = command("gqa-convert", source, "--groups", 4, "--out", tmp_path / name, *extra)
        assert finished.code == 0, finished.err
        assert f"wrote {tmp_path / name}" in finished.out
    assert (tmp_path / name / "config.json").exists()
    finished = command("gqa-convert", source, "--groups", 4, "--out", tmp_path / name)
    assert finished.code == OUTPUT
    assert len(finished.err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source", name])


def test_names_that_are_no_text(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / os.fsdecode(b"sour\xffce"))
    (source / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    out = tmp_path / os.fsdecode(b"o\xffut")
    for extra in ((), ("--force",)):
        finished = command("gqa-convert", source, "--groups", 4, "--out", out, *extra)
        assert finished.code == 0, finished.err
        assert "o\\udcffut" in finished.out
    assert (out / os.fsdecode(b"caf\xe9.txt")).exists()
    assert_refused(command("gqa-convert", source, "--groups", 3), USAGE, "--groups 3")


def test_output_where_a_file_is(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    (tmp_path / "out").write_text("a file")
    finished = command("gqa-convert", source, "--groups", 4, "--out", tmp_path / "out", "--force")
    assert_refused(finished, OUTPUT, "not a folder")
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("out", ["source", "source/inside", "source/deep/inside", ".", "source/../source"])
def test_output_in_or_over_the_source(
    out: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = factories.make(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert_refused(command("gqa-convert", source, "--groups", 4, "--out", out, "--force"), OUTPUT, "source")
    assert tree(tmp_path) == before


def test_output_through_a_link_to_the_source(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = tree(source)
    assert_refused(command("gqa-convert", source, "--groups", 4, "--out", tmp_path / "link", "--force"), OUTPUT)
    assert tree(source) == before


def test_output_in_a_folder_that_is_not_there(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    deep = tmp_path / "no" / "such" / "out"
    assert_refused(command("gqa-convert", source, "--groups", 3, "--out", deep), USAGE, "--groups 3")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert command("gqa-convert", source, "--groups", 4, "--out", deep).code == 0
    assert [path.name for path in deep.parent.iterdir()] == ["out"]


@contextmanager
def as_someone_else() -> Iterator[None]:
    """Lay down the right to write everywhere, where this process has it."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_unwritable_target(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    for folder in (source, *source.iterdir()):
        folder.chmod(0o777 if folder.is_dir() else 0o666)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        if folder.owner() == Path(tmp_path).owner() and "pytest" in str(folder):
            folder.chmod(0o755)
    with as_someone_else():
        finished = command("gqa-convert", source, "--groups", 4, "--out", locked / "out")
    assert_refused(finished, OUTPUT, "locked", "permission")
    assert list(locked.iterdir()) == []


def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    source = factories.make(tmp_path / "source")
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    assert_refused(command("gqa-convert", source, "--groups", 4), OUTPUT, "1,000 are free")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("call", ["write", "copy_file_range", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_disk_that_fills_up_or_fails(
    call: str, number: int, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = factories.make(tmp_path / "source")
    before = tree(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    finished = command("gqa-convert", source, "--groups", 4)
    monkeypatch.undo()
    assert_refused(finished, OUTPUT)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_real_limit_on_file_size(tmp_path: Path) -> None:
    """The operating system itself refuses the write, in a process of its own."""
    source = factories.make(tmp_path / "source")
    finished = subprocess.run(
        ["bash", "-c", f"ulimit -f 32; exec {sys.executable} -m gqa_convert.cli convert {source} --groups 4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused(Finished(finished.returncode, finished.stdout, finished.stderr), OUTPUT, "files that large")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_errors_of_other_commands_are_one_line_too(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    truncate(source)
    for arguments in (("inspect", source), ("plan", source, "--groups", 4), ("verify", source, source)):
        assert_refused(command("gqa", *arguments), CHECKPOINT, "truncated")


def test_json_adds_an_object_to_an_error(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    finished = command("gqa-convert", source, "--groups", 3, "--json")
    told = json.loads(finished.out)["error"]
    assert (told["kind"], told["exit_code"]) == ("UsageError", USAGE)
    assert finished.err == f"error: {told['message']}\n"


def test_a_fault_of_ours_keeps_its_traceback_and_leaves_nothing(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gqa_convert.conversion import execute

    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    source = factories.make(tmp_path / "source")
    monkeypatch.setattr(execute, "verify_output", break_down)
    with pytest.raises(ZeroDivisionError):
        command("gqa-convert", source, "--groups", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_interruption_leaves_nothing(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from gqa_convert.conversion import execute

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    source = factories.make(tmp_path / "source")
    monkeypatch.setattr(execute, "verify_output", interrupt)
    finished = command("gqa-convert", source, "--groups", 4)
    assert finished.code == 130
    assert len(finished.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
